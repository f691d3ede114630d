//! A chunk that passes the meter allocates nothing, whatever is in it.
use behavry_ollama_proxy::wire::{Endpoint, Framing, Meter};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call goes to the system's allocator as it is; counting touches a thread-local without a destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn allocations(mut work: impl FnMut()) -> u64 {
    let before = ALLOCATIONS.with(Cell::get);
    work();
    ALLOCATIONS.with(Cell::get) - before
}

#[test]
fn the_allocator_counts() {
    assert_eq!(allocations(|| drop(std::hint::black_box(Vec::<u8>::with_capacity(10)))), 1);
}

#[test]
fn a_fed_chunk_allocates_nothing() {
    let long = "x\\n".repeat(40_000);
    let native = format!(
        "{{\"message\":{{\"content\":\"{long}\"}},\"done\":false}}\n{{\"context\":[{}1],\"done\":true,\"done_reason\":\"stop\",\
         \"prompt_eval_count\":24,\"eval_count\":17}}\n{{\"error\":\"x\"}}\nnot json\n",
        "1,".repeat(40_000)
    );
    let events = format!(
        "event: x\ndata: {{\"type\":\"message_delta\",\"delta\":{{\"stop_reason\":\"{long}\"}},\"usage\":{{\"input_tokens\":1}}}}\n\n\
         data: {{\"choices\":[{{\"delta\":{{}}}}],\"response\":{{\"status\":\"completed\"}}}}\n\ndata: [DONE]\n\n: {long}\n\n"
    );
    use Endpoint::*;
    for endpoint in
        [Chat, Generate, Embed, ChatCompletions, Completions, OpenAiEmbeddings, Responses, Messages, Pull, Tags]
    {
        for (framing, stream) in
            [(Framing::Ndjson, &native), (Framing::Json, &native), (Framing::Sse, &events), (Framing::Ndjson, &events)]
        {
            for size in [1, 250, 16 * 1024, usize::MAX] {
                let mut meter = Meter::new(endpoint, framing);
                let mut usage = None;
                let count = allocations(|| {
                    for chunk in stream.as_bytes().chunks(size) {
                        meter.feed(chunk);
                    }
                    usage = Some(meter.finish());
                });
                assert_eq!(count, 0, "{endpoint:?} {framing:?} in chunks of {size}");
                if (endpoint, framing) == (Chat, Framing::Ndjson) && stream == &native {
                    assert_eq!(usage.and_then(|usage| usage.output_tokens), Some(17));
                }
            }
        }
    }
}
