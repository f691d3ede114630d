//! What a reply tells its caller, in whichever shape it comes, so that two replies can be compared; and the faults that a stream of
//! `/v1/responses` can have.

use serde_json::Value;

/// What a caller knows after a reply.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Told {
    pub status: u16,
    /// In the order in which they came; neighbours of one kind are one.
    pub items: Vec<Item>,
    pub finish: Option<String>,
    pub usage: Option<(u64, u64)>,
    /// The words of a failure.
    pub error: Option<String>,
    /// `[DONE]`, or the last event of `/v1/responses`.
    pub ended: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Item {
    Thought(String),
    Said(String),
    Call { id: String, name: String, arguments: String },
    Vector(Value),
    Model(String),
}

impl Told {
    pub fn by(status: u16, is_stream: bool, body: &str) -> Told {
        let mut told = Told { status, ..Told::default() };
        if is_stream {
            for event in events(body) {
                match event {
                    Event::Done => told.ended = true,
                    Event::Data(data) => told.learn(&data),
                    Event::Junk => {}
                }
            }
        } else if let Ok(body) = serde_json::from_str::<Value>(body) {
            told.learn(&body);
        } else if !body.is_empty() {
            told.error = Some(body.to_owned());
        }
        told.items.retain(|item| !matches!(item, Item::Said(said) | Item::Thought(said) if said.is_empty()));
        told
    }

    fn learn(&mut self, data: &Value) {
        if let Some(response) = data.get("response") {
            let kind = data["type"].as_str().unwrap_or_default();
            if ["response.completed", "response.incomplete", "response.failed"].contains(&kind) {
                self.ended = true;
                self.learn_response(response);
            }
            return;
        }
        if data["object"] == "response" {
            return self.learn_response(data);
        }
        match &data["error"] {
            Value::String(words) => self.error = Some(words.clone()),
            Value::Object(error) => self.error = Some(error["message"].as_str().unwrap_or_default().to_owned()),
            _ => {}
        }
        self.count(&data["usage"], "prompt_tokens", "completion_tokens");
        for choice in data["choices"].as_array().into_iter().flatten() {
            let message = if choice["delta"].is_object() { &choice["delta"] } else { &choice["message"] };
            self.add(message["reasoning"].as_str().map(|thought| Item::Thought(thought.to_owned())));
            self.add(message["content"].as_str().or(choice["text"].as_str()).map(|said| Item::Said(said.to_owned())));
            for call in message["tool_calls"].as_array().into_iter().flatten() {
                self.call(call);
            }
            if let Some(finish) = choice["finish_reason"].as_str() {
                self.finish = Some(finish.to_owned());
            }
        }
        for item in data["data"].as_array().into_iter().flatten() {
            let item = match item.get("embedding") {
                Some(vector) => Item::Vector(vector.clone()),
                None => Item::Model(item["id"].as_str().unwrap_or_default().to_owned()),
            };
            self.items.push(item);
        }
    }

    fn learn_response(&mut self, response: &Value) {
        let reason = response["incomplete_details"]["reason"].as_str();
        self.finish = reason.or(response["status"].as_str()).filter(|word| *word != "failed").map(str::to_owned);
        self.error = response["error"]["message"].as_str().map(str::to_owned);
        self.count(&response["usage"], "input_tokens", "output_tokens");
        for item in response["output"].as_array().into_iter().flatten() {
            let text = |of: &str| item[of].as_str().unwrap_or_default().to_owned();
            let texts = |of: &str| -> String {
                item[of].as_array().into_iter().flatten().filter_map(|part| part["text"].as_str()).collect()
            };
            self.items.push(match item["type"].as_str().unwrap_or_default() {
                "reasoning" => Item::Thought(texts("summary") + &texts("content")),
                "function_call" => Item::Call { id: text("call_id"), name: text("name"), arguments: text("arguments") },
                _ => Item::Said(texts("content")),
            });
        }
    }

    fn count(&mut self, usage: &Value, input: &str, output: &str) {
        let Some(input) = usage[input].as_u64() else { return };
        let output = usage[output].as_u64().unwrap_or(0);
        if (input, output) != (0, 0) {
            self.usage = Some((input, output)); // zeros are what nobody counted
        }
    }

    fn add(&mut self, item: Option<Item>) {
        match (self.items.last_mut(), item) {
            (_, None) => {}
            (Some(Item::Said(before)), Some(Item::Said(more))) => before.push_str(&more),
            (Some(Item::Thought(before)), Some(Item::Thought(more))) => before.push_str(&more),
            (_, Some(Item::Said(said) | Item::Thought(said))) if said.is_empty() => {}
            (_, Some(item)) => self.items.push(item),
        }
    }

    /// A call without an id is the rest of the one before it.
    fn call(&mut self, call: &Value) {
        let text = |of: &Value| of.as_str().unwrap_or_default().to_owned();
        let (id, function) = (text(&call["id"]), &call["function"]);
        if id.is_empty()
            && let Some(Item::Call { arguments, .. }) = self.items.last_mut()
        {
            return arguments.push_str(&text(&function["arguments"]));
        }
        self.items.push(Item::Call { id, name: text(&function["name"]), arguments: text(&function["arguments"]) });
    }
}

enum Event {
    Data(Value),
    Done,
    Junk,
}

/// Lines of `data:`, and bare lines of JSON.
fn events(body: &str) -> Vec<Event> {
    let lines = body.lines().filter(|line| !line.is_empty() && !line.starts_with(':') && !line.starts_with("event:"));
    lines
        .map(|line| match line.strip_prefix("data: ").unwrap_or(line) {
            "[DONE]" => Event::Done,
            data => serde_json::from_str(data).map_or(Event::Junk, Event::Data),
        })
        .collect()
}

/// The faults of section 4.2, by their letters, that a stream of `/v1/responses` has by itself. (`a` is seen by what was said, `n` by
/// an end that never comes.)
pub fn faults(body: &str) -> String {
    let events: Vec<Value> = events(body)
        .into_iter()
        .filter_map(|event| if let Event::Data(data) = event { Some(data) } else { None })
        .collect();
    let kind = |event: &Value| event["type"].as_str().unwrap_or_default().trim_start_matches("response.").to_owned();
    let kinds: Vec<String> = events.iter().map(kind).collect();
    let last = events.last().cloned().unwrap_or_default();
    let output = last["response"]["output"].as_array().cloned().unwrap_or_default();
    let has_ended = ["completed", "incomplete", "failed"].contains(&kind(&last).as_str());
    let ends_well = has_ended && kind(&last) != "failed";
    let text = |of: &Value| of.as_str().unwrap_or_default().to_owned();
    // Item, and where in the stream it was added, was done, and was spoken of.
    let added: Vec<(usize, String, &Value)> = events
        .iter()
        .enumerate()
        .filter(|(at, _)| kinds[*at] == "output_item.added")
        .map(|(at, event)| (at, text(&event["item"]["id"]), event))
        .collect();
    let done = |id: &str| {
        events.iter().zip(&kinds).position(|(event, kind)| kind == "output_item.done" && event["item"]["id"] == id)
    };
    let place = |id: &str| output.iter().position(|item| item["id"] == id);
    let mut found = String::new();
    let mut fault = |letter: char, is: bool| {
        if is {
            found.push(letter);
        }
    };
    fault(
        'b',
        ends_well && added.iter().any(|(_, id, event)| place(id).is_some_and(|place| event["output_index"] != place)),
    );
    fault(
        'c',
        events.iter().zip(&kinds).any(|(event, kind)| {
            kind.starts_with("function_call") && event["content_index"].is_u64()
                || event["item"]["type"] == "function_call" && event["content_index"].is_u64()
        }),
    );
    fault('d', ends_well && added.iter().any(|(_, id, _)| done(id).is_none()));
    fault(
        'e',
        added
            .iter()
            .any(|(_, id, event)| event["item"]["type"] == "function_call" && event["item"]["call_id"] == id.as_str()),
    );
    fault(
        'f',
        events.iter().map(|event| &event["response"]).filter(|response| response.is_object()).any(|response| {
            response["object"] != "response"
                || response["status"].as_str().is_none()
                || text(&response["model"]).is_empty()
        }),
    );
    let thinks = kinds.iter().any(|kind| kind == "reasoning_summary_text.delta");
    let has = |wanted: &str| kinds.iter().any(|kind| kind == wanted);
    fault(
        'g',
        thinks
            && ends_well
            && !(has("reasoning_summary_part.added")
                && has("reasoning_summary_text.done")
                && has("reasoning_summary_part.done")),
    );
    let spoken_of = |event: &Value| text(&event["item_id"]);
    fault(
        'h',
        events
            .iter()
            .enumerate()
            .any(|(at, event)| event["item_id"].is_string() && done(&spoken_of(event)).is_some_and(|done| done < at)),
    );
    let ids: Vec<&str> = added.iter().map(|(_, id, _)| id.as_str()).collect();
    let order: Vec<usize> = ids.iter().filter_map(|id| place(id)).collect();
    fault('i', !order.is_sorted());
    fault(
        'j',
        events
            .iter()
            .any(|event| event.get("item") == Some(&Value::Null) || event.get("logprobs") == Some(&Value::Null))
            || added
                .iter()
                .any(|(_, _, event)| event["item"]["type"] == "message" && event["item"]["status"].is_null()),
    );
    fault(
        'k',
        ends_well
            && added.iter().any(|(at, id, event)| {
                event["item"]["type"] == "function_call"
                    && done(id).is_some_and(|done| added.iter().any(|(other, _, _)| (*at + 1..done).contains(other)))
            }),
    );
    fault('l', ends_well && output.is_empty());
    fault('m', !has_ended);
    found
}
