use super::*;

/// A scheduler on simulated time, and what it has granted.
struct Bench {
    scheduler: Scheduler,
    origin: Instant,
    now: Instant,
    granted: Vec<Grant>,
    expired: Vec<WaiterId>,
    nowhere: Vec<WaiterId>,
    gave_way: Vec<RunId>,
    states: Vec<State>,
}

fn names(models: &[&'static str]) -> Vec<(&'static str, u64)> {
    models.iter().map(|model| (*model, 4_000_000_000)).collect()
}

impl Bench {
    /// Backends that have `a`, `b` and `c` on disk, and nothing loaded.
    fn with(settings: Settings, backends: Vec<BackendSettings>) -> Bench {
        let origin = Instant::now();
        let count = backends.len();
        let mut scheduler = Scheduler::new(origin, settings, backends);
        for backend in 0..count {
            let held = names(&["a", "b", "c"]);
            scheduler.seen(origin, backend, &Inventory { held: Some(&held), loaded: Some(&[]) });
        }
        let (granted, expired, nowhere, gave_way) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Bench { scheduler, origin, now: origin, granted, expired, nowhere, gave_way, states: vec![State::Up; count] }
    }

    fn set_state(&mut self, backend: usize, state: State) {
        self.states[backend] = state;
        let states = self.states.clone();
        self.scheduler.judge = Box::new(move |place: usize, _: &str| states[place]);
    }

    fn of(backends: usize) -> Bench {
        Bench::with(Settings::default(), vec![BackendSettings::default(); backends])
    }

    fn warm(mut self, backend: usize, models: &[&'static str]) -> Bench {
        self.scheduler.seen(self.now, backend, &Inventory { held: None, loaded: Some(&names(models)) });
        self
    }

    fn want(&self, model: &str, agent: &str) -> Want {
        Want {
            model: model.into(),
            agent: agent.into(),
            class: Class::Default,
            input_bytes: 400,
            most_tokens: Some(100),
            conversation: None,
            streams: true,
            deadline: self.origin + Duration::from_secs(100_000),
            barred: Vec::new(),
            only_read: false,
            only_holding: false,
        }
    }

    fn arrive(&mut self, want: Want) -> WaiterId {
        let waiter = self.scheduler.arrive(self.now, want).expect("there is room");
        self.poll();
        waiter
    }

    fn ask(&mut self, model: &str, agent: &str) -> WaiterId {
        let want = self.want(model, agent);
        self.arrive(want)
    }

    fn poll(&mut self) {
        let mut decisions = Vec::new();
        loop {
            self.scheduler.poll(self.now, &mut decisions);
            if self.scheduler.wake().is_none_or(|at| at > self.now) {
                break;
            }
        }
        for decision in decisions {
            match decision {
                Decision::Granted(grant) => self.granted.push(grant),
                Decision::Expired(waiter) => self.expired.push(waiter),
                Decision::Nowhere(waiter) => self.nowhere.push(waiter),
                Decision::GivesWay(run) => self.gave_way.push(run),
            }
        }
    }

    fn after(&mut self, seconds: f64) {
        self.now += Duration::from_secs_f64(seconds);
        self.poll();
    }

    fn grant_of(&self, waiter: WaiterId) -> Option<Grant> {
        self.granted.iter().copied().find(|grant| grant.waiter == waiter)
    }

    #[track_caller]
    fn granted(&self, waiter: WaiterId) -> Grant {
        self.grant_of(waiter).expect("it was granted")
    }

    fn answer(&mut self, waiter: WaiterId) {
        let run = self.granted(waiter).run;
        self.scheduler.first_byte(self.now, run);
        let measured = Measured { output_tokens: Some(100), ..Measured::default() };
        self.end(waiter, Ended::Complete(measured));
    }

    /// An answer that takes as long as a real one.
    fn serve(&mut self, waiter: WaiterId) {
        self.after(2.0);
        self.scheduler.first_byte(self.now, self.granted(waiter).run);
        self.after(2.0);
        self.answer(waiter);
    }

    fn end(&mut self, waiter: WaiterId, how: Ended) {
        let run = self.granted(waiter).run;
        self.scheduler.ended(self.now, run, how);
        self.poll();
    }
}

#[test]
fn a_free_slot_is_granted_at_once_and_a_busy_one_when_it_is_free() {
    let mut bench = Bench::of(1).warm(0, &["a"]);
    let first = bench.ask("a", "x");
    let second = bench.ask("a", "x");
    assert_eq!(bench.granted(first).waited, Duration::ZERO);
    assert_eq!(bench.grant_of(second), None, "one slot, one request");
    bench.after(3.0);
    assert_eq!(bench.grant_of(second), None);
    bench.answer(first);
    assert!((bench.granted(second).waited.as_secs_f64() - 3.0).abs() < 1e-6);
}

#[test]
fn a_model_with_more_slots_has_more_running() {
    let slots = BackendSettings { slots: 2, model_slots: HashMap::from([("b".to_owned(), 3)]), ..Default::default() };
    let mut bench = Bench::with(Settings::default(), vec![slots]).warm(0, &["a", "b"]);
    for _ in 0..5 {
        bench.ask("a", "x");
        bench.ask("b", "x");
    }
    let models: Vec<usize> = bench.scheduler.runs.values().map(|run| run.model).collect();
    let of = |name: &str| models.iter().filter(|model| *bench.scheduler.book.models[**model].name == *name).count();
    assert_eq!((of("a"), of("b")), (2, 3));
}

#[test]
fn an_agent_that_floods_the_queue_waits_behind_itself() {
    let mut bench = Bench::of(1).warm(0, &["a"]);
    let flood: Vec<WaiterId> = (0..20).map(|_| bench.ask("a", "flood")).collect();
    bench.after(1.0);
    let late = bench.ask("a", "late");
    bench.answer(flood[0]);
    assert!(bench.grant_of(late).is_some(), "it came last of twenty-one, and is next");
    bench.answer(late);
    assert!(bench.grant_of(flood[1]).is_some(), "and then the others");
}

#[test]
fn agents_that_keep_asking_get_equal_time_though_one_asks_for_more() {
    let mut bench = Bench::of(1).warm(0, &["a"]);
    let mut time: HashMap<&'static str, f64> = HashMap::new();
    let mut asked: HashMap<WaiterId, (&'static str, u64)> = HashMap::new();
    let ask = |bench: &mut Bench, asked: &mut HashMap<_, _>, agent: &'static str, tokens: u64| {
        let want = Want { most_tokens: Some(tokens), ..bench.want("a", agent) };
        asked.insert(bench.scheduler.arrive(bench.now, want).expect("there is room"), (agent, tokens));
    };
    for _ in 0..4 {
        ask(&mut bench, &mut asked, "long", 400);
        ask(&mut bench, &mut asked, "short", 100);
    }
    bench.poll();
    for _ in 0..400 {
        let grant = *bench.granted.last().expect("one runs");
        let (agent, tokens) = asked[&grant.waiter];
        let seconds = tokens as f64 / 100.0;
        bench.scheduler.first_byte(bench.now, grant.run);
        bench.after(seconds);
        *time.entry(agent).or_default() += seconds;
        ask(&mut bench, &mut asked, agent, tokens);
        bench.end(grant.waiter, Ended::Complete(Measured { output_tokens: Some(tokens), ..Measured::default() }));
    }
    let ratio = time["long"] / time["short"];
    assert!((0.7..1.4).contains(&ratio), "{time:?}");
}

#[test]
fn people_go_before_jobs_and_jobs_are_not_starved() {
    let mut bench = Bench::of(1).warm(0, &["a"]);
    let first = bench.ask("a", "x");
    let job = Want { class: Class::Batch, ..bench.want("a", "job") };
    let job = bench.arrive(job);
    let person = Want { class: Class::Interactive, ..bench.want("a", "person") };
    let person = bench.arrive(person);
    bench.answer(first);
    assert!(bench.grant_of(person).is_some());
    assert_eq!(bench.grant_of(job), None, "it came first, and is of a lower class");
    // From now on there is always somebody of the highest class, each of them new.
    let mut running = person;
    for i in 0..200 {
        let next = Want { class: Class::Interactive, ..bench.want("a", &format!("person-{i}")) };
        let next = bench.arrive(next);
        bench.after(2.0);
        bench.answer(running);
        if bench.grant_of(job).is_some() {
            return;
        }
        running = next;
    }
    panic!("the job never ran");
}

#[test]
fn who_waits_past_the_deadline_is_told() {
    let mut bench = Bench::of(1).warm(0, &["a"]);
    let first = bench.ask("a", "x");
    let hasty = Want { deadline: bench.now + Duration::from_secs(5), ..bench.want("a", "y") };
    let hasty = bench.arrive(hasty);
    assert!(bench.scheduler.wake().expect("something is due") <= bench.now + Duration::from_secs(5));
    bench.after(4.9);
    assert!(bench.expired.is_empty());
    bench.after(0.2);
    assert_eq!(bench.expired, [hasty]);
    bench.answer(first);
    assert_eq!(bench.grant_of(hasty), None, "nobody is there any more");
    assert_eq!(bench.scheduler.waiting(), 0);
}

#[test]
fn who_leaves_frees_the_place_and_is_never_granted_anything() {
    let mut bench = Bench::of(1).warm(0, &["a"]);
    let first = bench.ask("a", "x");
    let leaver = bench.ask("a", "x");
    let last = bench.ask("a", "x");
    bench.scheduler.leave(leaver);
    assert_eq!(bench.scheduler.waiting(), 1);
    bench.answer(first);
    assert_eq!(bench.grant_of(leaver), None);
    assert!(bench.grant_of(last).is_some());
    bench.scheduler.leave(last); // too late, and harmless
    assert_eq!(bench.scheduler.busy(), 1);
}

#[test]
fn a_slot_lingers_after_its_client_has_left() {
    let mut bench = Bench::of(1).warm(0, &["a"]);
    let first = bench.ask("a", "x");
    let second = bench.ask("a", "x");
    bench.end(first, Ended::Left);
    assert_eq!(bench.grant_of(second), None, "Ollama has not noticed yet");
    assert_eq!(bench.scheduler.busy(), 1);
    bench.after(0.19);
    assert_eq!(bench.grant_of(second), None);
    bench.after(0.02);
    assert!(bench.grant_of(second).is_some());
}

#[test]
fn the_queue_has_bounds_for_the_caller_the_model_and_the_whole() {
    let settings = Settings { agent_waiting: 2, model_waiting: 3, all_waiting: 4, ..Settings::default() };
    let mut bench = Bench::with(settings, vec![BackendSettings::default()]).warm(0, &["a", "b"]);
    bench.ask("a", "runs");
    bench.ask("b", "runs");
    bench.ask("a", "x");
    bench.ask("a", "x");
    let refused = |bench: &mut Bench, model: &str, agent: &str| {
        let want = bench.want(model, agent);
        bench.scheduler.arrive(bench.now, want).err()
    };
    assert!(matches!(refused(&mut bench, "b", "x"), Some(Full::Share { .. })), "two of x's wait already");
    bench.ask("a", "y");
    match refused(&mut bench, "a", "z") {
        Some(Full::Whole { retry_after }) => assert!((1..=60).contains(&retry_after.as_secs())),
        other => panic!("three wait for a: {other:?}"),
    }
    bench.ask("b", "z");
    assert!(matches!(refused(&mut bench, "b", "w"), Some(Full::Whole { .. })), "four wait");
}

#[test]
fn a_request_waits_for_a_warm_slot_that_is_soon_free_and_not_for_one_that_is_not() {
    let mut bench = Bench::of(2).warm(0, &["a"]);
    let short = Want { most_tokens: Some(20), ..bench.want("a", "x") };
    let short = bench.arrive(short);
    assert_eq!((bench.granted(short).backend, bench.granted(short).reason), (0, Reason::Loaded));
    let behind = bench.ask("a", "x");
    assert_eq!(bench.grant_of(behind), None, "a load takes seconds, the answer before it less");
    bench.answer(short);
    assert_eq!(bench.granted(behind).backend, 0);
    bench.answer(behind);

    let mut bench = Bench::of(2).warm(0, &["a"]);
    let long = Want { most_tokens: None, input_bytes: 4_000_000, ..bench.want("a", "x") };
    bench.arrive(long);
    let behind = bench.ask("a", "x");
    assert_eq!((bench.granted(behind).backend, bench.granted(behind).reason), (1, Reason::SecondCopy));
}

#[test]
fn a_long_queue_opens_a_second_copy_while_the_first_still_wait_for_the_warm_one() {
    let mut bench = Bench::of(2).warm(0, &["a"]);
    bench.ask("a", "x");
    let waiters: Vec<WaiterId> = (0..12).map(|_| bench.ask("a", "x")).collect();
    let cold = waiters.iter().position(|waiter| bench.grant_of(*waiter).is_some()).expect("a second copy is opened");
    assert!(cold > 0, "the first in the queue is better off where it stands");
    assert_eq!(bench.granted(waiters[cold]).backend, 1);
}

#[test]
fn two_models_are_not_loaded_on_one_backend_at_the_same_time() {
    let mut bench = Bench::of(1);
    let first = bench.ask("a", "x");
    let second = bench.ask("b", "x");
    assert_eq!(bench.granted(first).reason, Reason::Only);
    assert_eq!(bench.grant_of(second), None, "Ollama would queue it behind the load, where it cannot be called back");
    bench.scheduler.first_byte(bench.now, bench.granted(first).run);
    bench.after(0.2);
    assert_eq!(bench.granted(second).backend, 0, "once it is loaded, the next may load");
}

#[test]
fn where_nobody_knows_what_is_loaded_nothing_is_held_back_for_a_load() {
    let origin = Instant::now();
    let scheduler = Scheduler::new(origin, Settings::default(), vec![BackendSettings::default()]);
    let (granted, expired, nowhere) = (Vec::new(), Vec::new(), Vec::new());
    let mut bench = Bench {
        scheduler,
        origin,
        now: origin,
        granted,
        expired,
        nowhere,
        gave_way: Vec::new(),
        states: vec![State::Up],
    };
    let both = [bench.ask("a", "x"), bench.ask("b", "x")];
    assert!(both.iter().all(|waiter| bench.granted(*waiter).reason == Reason::Only));
}

#[test]
fn a_model_that_is_seen_in_memory_is_loaded_though_its_first_answer_has_not_begun() {
    let slots = BackendSettings { slots: 2, ..BackendSettings::default() };
    let mut bench = Bench::with(Settings::default(), vec![slots]);
    let whole = Want { streams: false, ..bench.want("a", "x") };
    bench.arrive(whole);
    let (second, other) = (bench.ask("a", "x"), bench.ask("b", "x"));
    assert_eq!((bench.grant_of(second), bench.grant_of(other)), (None, None));
    bench.scheduler.seen(bench.now, 0, &Inventory { held: None, loaded: Some(&names(&["a"])) });
    bench.poll();
    assert!(bench.grant_of(second).is_some() && bench.grant_of(other).is_some());
}

#[test]
fn a_load_goes_where_it_evicts_nothing_that_is_in_demand() {
    let mut bench = Bench::of(2).warm(0, &["a"]);
    for backend in 0..2 {
        bench.scheduler.book.backends[backend].room_bytes = 6_000_000_000; // one of them, and not two
    }
    for _ in 0..5 {
        let waiter = bench.ask("a", "x");
        bench.after(0.1);
        bench.answer(waiter);
    }
    let other = bench.ask("b", "x");
    assert_eq!((bench.granted(other).backend, bench.granted(other).reason), (1, Reason::Held));
}

#[test]
fn room_is_learnt_from_what_a_load_pushed_out() {
    let mut bench = Bench::of(1).warm(0, &["a", "b"]);
    let room = |bench: &Bench| bench.scheduler.book.backends[0].room_bytes;
    assert_eq!(room(&bench), u64::MAX, "nobody knows");
    bench.after(1.0);
    let waiter = bench.ask("c", "x");
    bench.answer(waiter);
    bench.scheduler.seen(bench.now, 0, &Inventory { held: None, loaded: Some(&names(&["b", "c"])) });
    assert!((8_000_000_000..12_000_000_000).contains(&room(&bench)), "two of them fit, and three do not");
    bench.scheduler.seen(bench.now, 0, &Inventory { held: None, loaded: Some(&names(&["a", "b", "c"])) });
    assert_eq!(room(&bench), 12_000_000_000, "they do, after all");
}

#[test]
fn a_conversation_returns_to_where_it_was_unless_that_is_too_busy() {
    let mut bench = Bench::of(2).warm(0, &["a"]).warm(1, &["a"]);
    let talk = |bench: &Bench, key: u64| Want { conversation: Some(key), input_bytes: 80_000, ..bench.want("a", "x") };
    let first = bench.arrive(talk(&bench, 1));
    let home = bench.granted(first).backend;
    bench.serve(first);
    let other = bench.arrive(talk(&bench, 2));
    assert_ne!(bench.granted(other).backend, home, "another does not take its place in the cache");
    bench.serve(other);
    for _ in 0..3 {
        let again = bench.arrive(talk(&bench, 1));
        assert_eq!((bench.granted(again).backend, bench.granted(again).reason), (home, Reason::Conversation));
        bench.serve(again);
    }
    let holder = Want { input_bytes: 40_000_000, barred: vec![1 - home], ..talk(&bench, 1) };
    bench.arrive(holder);
    let again = bench.arrive(talk(&bench, 1));
    assert_ne!(bench.granted(again).backend, home, "a cache is not worth waiting that long for");
}

#[test]
fn a_faster_backend_is_found_out_and_gets_more() {
    let mut bench = Bench::of(2).warm(0, &["a"]).warm(1, &["a"]);
    let mut served = [0, 0];
    for round in 0..40 {
        let waiter = bench.ask("a", "x");
        let backend = bench.granted(waiter).backend;
        served[backend] += usize::from(round >= 10);
        bench.scheduler.first_byte(bench.now, bench.granted(waiter).run);
        bench.after(if backend == 0 { 8.0 } else { 1.0 });
        let measured = Measured { output_tokens: Some(100), ..Measured::default() };
        bench.end(waiter, Ended::Complete(measured));
    }
    assert!(served[1] > served[0] * 5, "{served:?}");
}

#[test]
fn a_higher_tier_is_used_when_the_lower_one_is_busy_for_longer_than_that_is_worth() {
    let cheap = BackendSettings::default();
    let dear = BackendSettings { tier: 1, ..cheap.clone() };
    let mut bench = Bench::with(Settings::default(), vec![dear, cheap]).warm(0, &["a"]).warm(1, &["a"]);
    let first = bench.ask("a", "x");
    assert_eq!(bench.granted(first).backend, 1);
    let second = bench.ask("a", "x");
    assert_eq!(bench.grant_of(second), None, "ten seconds are not reached yet");
    bench.serve(first);
    let long = Want { input_bytes: 4_000_000, barred: vec![0], ..bench.want("a", "x") };
    bench.serve(second);
    bench.arrive(long);
    let third = bench.ask("a", "x");
    assert_eq!(bench.granted(third).backend, 0);
}

#[test]
fn a_backend_that_may_be_tried_again_gets_one_request_and_no_more() {
    let slots = BackendSettings { slots: 8, ..BackendSettings::default() };
    let mut bench = Bench::with(Settings::default(), vec![slots; 2]).warm(0, &["a"]).warm(1, &["a"]);
    bench.set_state(0, State::Down);
    let there = bench.ask("a", "x");
    assert_eq!(bench.granted(there).backend, 1);
    bench.set_state(0, State::Trial);
    for _ in 0..6 {
        bench.scheduler.arrive(bench.now, bench.want("a", "x")).expect("there is room");
    }
    bench.poll();
    let on_trial = |bench: &Bench| bench.granted.iter().filter(|grant| grant.backend == 0).count();
    assert_eq!((bench.granted.len(), on_trial(&bench)), (7, 1), "placed together");
    bench.ask("a", "x");
    assert_eq!((bench.granted.len(), on_trial(&bench)), (8, 1), "and after it");
}

#[test]
fn whoever_does_not_wait_is_counted_though_no_slot_is_free() {
    let mut bench = Bench::of(2).warm(0, &["a"]).warm(1, &["a"]);
    let (first, second) = (bench.ask("a", "x"), bench.ask("a", "x"));
    let place = bench.granted(first).backend;
    let want = Want { barred: vec![place], ..bench.want("a", "x") };
    let moved = bench.scheduler.at_once(bench.now, &want).expect("the other one");
    assert_eq!((moved.backend, bench.scheduler.busy()), (1 - place, 3));
    let waits = Want { barred: vec![place], ..bench.want("a", "x") };
    let waits = bench.arrive(waits);
    bench.answer(second);
    assert_eq!(bench.grant_of(waits), None, "its place is still taken");
    bench.scheduler.ended(bench.now, moved.run, Ended::Moot);
    bench.poll();
    assert_eq!(bench.granted(waits).backend, 1 - place);
    let nowhere = Want { barred: vec![0, 1], ..bench.want("a", "x") };
    assert!(bench.scheduler.at_once(bench.now, &nowhere).is_none());
}

#[test]
fn where_all_have_failed_the_last_resort_is_used_and_where_all_are_drained_none() {
    let mut bench = Bench::of(2).warm(0, &["a"]);
    bench.set_state(0, State::Down);
    bench.set_state(1, State::Down);
    let waiter = bench.ask("a", "x");
    assert_eq!(bench.granted(waiter).reason, Reason::LastResort);
    bench.answer(waiter);
    bench.set_state(1, State::Drained);
    let waiter = bench.ask("a", "x");
    assert_eq!(bench.granted(waiter).reason, Reason::Only);
    bench.answer(waiter);
    bench.set_state(0, State::Drained);
    let waiter = bench.ask("a", "x");
    assert_eq!(bench.nowhere, [waiter]);
    bench.set_state(0, State::Up);
    let barred = Want { barred: vec![0], ..bench.want("a", "x") };
    let barred = bench.arrive(barred);
    assert_eq!(bench.nowhere, [waiter, barred]);
}

/// What was known when it came is nothing to go by when it is placed.
#[test]
fn whoever_waits_goes_by_what_is_known_when_it_is_placed() {
    let settings = || Settings { tier: Duration::from_secs(100_000), ..Settings::default() };
    let mut scheduler = Scheduler::new(Instant::now(), settings(), vec![BackendSettings::default(); 2]);
    let held = names(&["a"]);
    let origin = scheduler.origin;
    scheduler.seen(origin, 0, &Inventory { held: Some(&held), loaded: Some(&held) });
    let mut bench = Bench { scheduler, ..Bench::of(2) };
    bench.now = origin;
    let only_read = |bench: &Bench| Want { only_read: true, ..bench.want("a", "x") };
    let first = bench.arrive(only_read(&bench));
    assert_eq!(bench.granted(first).backend, 0);
    let second = bench.arrive(only_read(&bench));
    assert_eq!(bench.grant_of(second), None, "the other one has not said yet what it has");
    bench.scheduler.seen(bench.now, 1, &Inventory { held: Some(&held), loaded: Some(&held) });
    bench.poll();
    assert_eq!(bench.granted(second).backend, 1, "now it has");

    // Two wait; one backend is drained, and the other's slot is free before.
    let (third, fourth) = (bench.arrive(only_read(&bench)), bench.arrive(only_read(&bench)));
    bench.set_state(0, State::Drained);
    bench.answer(first);
    assert_eq!(bench.grant_of(third), None, "a drained one gets nothing");
    bench.answer(second);
    assert_eq!(bench.granted(third).backend, 1);
    bench.set_state(0, State::Down);
    bench.after(1.0);
    assert_eq!(bench.grant_of(fourth), None, "nor one that fails");
    bench.set_state(0, State::Up);
    bench.after(1.0);
    assert_eq!(bench.granted(fourth).backend, 0, "one that came back does");
}

#[test]
fn an_outlook_names_what_a_request_gets_and_leaves_no_trace() {
    let mut bench = Bench::of(2).warm(0, &["a"]);
    let trace = |bench: &Bench| {
        let of = &bench.scheduler;
        let agents = of.book.models.iter().map(|model| model.queue.agents()).sum::<usize>();
        (of.waiting(), of.busy(), of.last_id, of.book.models.len(), of.book.names.len(), agents, of.agents.len())
    };
    let before = trace(&bench);
    let want = bench.want("a", "x");
    let outlook = bench.scheduler.outlook(bench.now, &want).expect("there is room");
    assert_eq!((outlook.ahead, outlook.chosen.expect("one").is_free), (0, true));
    let unknown = bench.want("never-heard-of", "x");
    let nobodys = bench.scheduler.outlook(bench.now, &unknown).expect("there is room");
    assert_eq!(nobodys.chosen.expect("one").reason, Reason::Absent);
    assert_eq!(trace(&bench), before);
    let standings: Vec<Standing> = outlook.offers.iter().map(|offer| offer.standing).collect();
    assert_eq!(standings, [Standing::Loaded, Standing::Held]);
    // The least cost wins, and it is the backend that a request gets.
    assert!(outlook.offers[0].cost_s < outlook.offers[1].cost_s && outlook.offers[1].load_s > 0.0);
    let first = bench.ask("a", "x");
    assert_eq!(bench.granted(first).backend, outlook.chosen.expect("one").backend);

    // Each prophecy comes true, behind any number of others.
    for n in 0..40 {
        let want = Want {
            class: Class::ALL[n % 3],
            barred: if n % 5 == 0 { vec![1] } else { Vec::new() },
            ..bench.want("a", ["x", "y", "z"][n % 3])
        };
        let before = trace(&bench);
        let outlook = bench.scheduler.outlook(bench.now, &want).expect("there is room");
        assert_eq!(trace(&bench), before, "{n}");
        let chosen = outlook.chosen.expect("one");
        let waiter = bench.arrive(want);
        let granted = bench.grant_of(waiter);
        assert_eq!(granted.is_some(), chosen.is_free, "{n}");
        assert!(granted.is_none_or(|grant| (grant.backend, grant.reason) == (chosen.backend, chosen.reason)), "{n}");
        if n % 4 == 3 {
            let ends = bench.granted.iter().rfind(|grant| bench.scheduler.runs.contains_key(&grant.run.0)).copied();
            bench.answer(ends.expect("some run").waiter);
        }
    }
    bench.set_state(0, State::Drained);
    bench.set_state(1, State::Down);
    let outlook = bench.scheduler.outlook(bench.now, &want).expect("there is room");
    let standings: Vec<Standing> = outlook.offers.iter().map(|offer| offer.standing).collect();
    assert_eq!(standings, [Standing::Drained, Standing::Failing]);
}

#[test]
fn what_is_loaded_for_nobody_is_in_nobodys_way() {
    let mut bench = Bench::of(1).warm(0, &["a"]);
    let load = |bench: &mut Bench, model: &str| {
        let run = bench.scheduler.preload(bench.now, 0, model);
        bench.poll();
        run
    };
    assert_eq!(load(&mut bench, "a"), None, "it is loaded");
    let run = load(&mut bench, "b").expect("nobody is there");
    assert_eq!(load(&mut bench, "c"), None, "one at a time");
    // A loaded model is none of its business.
    let loaded = bench.ask("a", "x");
    assert_eq!(bench.granted(loaded).backend, 0);
    // The same model is loaded once, and for both.
    let same = bench.ask("b", "x");
    assert_eq!(bench.grant_of(same), None, "one slot, one load");
    bench.scheduler.ended(
        bench.now,
        run,
        Ended::Complete(Measured { load: Some(Duration::from_secs(3)), ..Measured::default() }),
    );
    bench.poll();
    assert_eq!(bench.granted(same).reason, Reason::Only);
    bench.answer(same);
    assert!(bench.gave_way.is_empty());

    // Another model's request has the loader at once. (It went by itself: nothing has pushed it out.)
    bench.after(400.0);
    bench.scheduler.seen(bench.now, 0, &Inventory { held: None, loaded: Some(&names(&["a"])) });
    bench.after(1.0);
    let run = load(&mut bench, "b").expect("it is not loaded any more");
    let other = bench.ask("c", "x");
    assert_eq!((bench.granted(other).waited, &bench.gave_way[..]), (Duration::ZERO, &[run][..]));
    let lingers = bench.ask("b", "x");
    assert_eq!(bench.grant_of(lingers), None, "its backend has a moment to notice, and then loads for the other one");
    bench.scheduler.ended(bench.now, run, Ended::Left); // what held it is told, and lets go
    bench.answer(other);
    bench.after(1.0);
    assert_eq!(bench.granted(lingers).backend, 0);
    assert_eq!(load(&mut bench, "c"), None, "it is loaded by now");
    bench.answer(lingers);
    bench.answer(loaded);
    assert_eq!(bench.scheduler.busy(), 0);
}

#[test]
fn nothing_is_loaded_for_nobody_where_work_should_not_go_or_something_used_makes_room() {
    let mut bench = Bench::of(1).warm(0, &["a"]);
    let (runs, waits) = (bench.ask("a", "x"), bench.ask("a", "x"));
    let run = bench.scheduler.preload(bench.now, 0, "b").expect("who waits for a loaded model needs no loader");
    bench.scheduler.ended(bench.now, run, Ended::Moot);
    bench.answer(runs);
    for state in [State::Down, State::Trial, State::Drained] {
        bench.set_state(0, state);
        assert_eq!(bench.scheduler.preload(bench.now, 0, "b"), None, "{state:?}");
    }
    bench.set_state(0, State::Up);
    bench.scheduler.book.backends[0].room_bytes = 5_000_000_000; // one of them
    assert_eq!(bench.scheduler.preload(bench.now, 0, "b"), None, "what is used would make room");
    bench.answer(waits);
    assert!(bench.scheduler.preload(bench.now, 0, "b").is_some());
}

#[test]
fn a_backend_without_the_model_is_not_asked_while_another_has_it() {
    let mut bench = Bench::of(2);
    bench.scheduler.seen(bench.now, 0, &Inventory { held: Some(&names(&["b"])), loaded: Some(&[]) });
    let first = bench.ask("a", "x");
    assert_eq!(bench.granted(first).backend, 1);
    let second = bench.ask("a", "x");
    assert_eq!(bench.grant_of(second), None, "it waits rather than be told that there is no such model");
    bench.answer(first);
    assert_eq!(bench.granted(second).backend, 1);
    let nobodys = bench.ask("nobodys", "x");
    assert_eq!(bench.granted(nobodys).reason, Reason::Absent);
}

#[test]
fn names_that_clients_invent_are_forgotten() {
    let mut bench = Bench::of(1);
    for i in 0..6000 {
        let waiter = bench.ask(&format!("invented-{i}"), "x");
        bench.end(waiter, Ended::Moot);
    }
    assert!(bench.scheduler.book.models.len() <= 4096);
    assert!(bench.scheduler.book.names.contains_key("a"), "what a backend has is not");
}

#[test]
fn agents_that_clients_invent_are_forgotten() {
    let mut bench = Bench::of(1).warm(0, &["a"]);
    for i in 0..6000 {
        let waiter = bench.ask("a", &format!("agent-{i}"));
        bench.answer(waiter);
    }
    assert!(bench.scheduler.book.models[0].queue.agents() <= 1025);
    assert!(bench.scheduler.agents.is_empty());
}

/// SplitMix64: the same events on every machine.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[test]
fn no_order_of_events_loses_a_slot_or_a_place_in_the_queue() {
    for seed in 0..60 {
        let mut state = seed;
        let mut pick = |n: u64| random(&mut state) % n;
        let backends = 1 + pick(4) as usize;
        let slots = BackendSettings { slots: 1 + pick(3) as usize, ..BackendSettings::default() };
        let settings = Settings { model_waiting: 20, agent_waiting: 9, all_waiting: 40, ..Settings::default() };
        let mut bench = Bench::with(settings, vec![slots.clone(); backends]);
        let mut waiting: Vec<WaiterId> = Vec::new();
        let mut running: Vec<(RunId, WaiterId)> = Vec::new();
        for _ in 0..600 {
            match pick(10) {
                0..=3 => {
                    let model = ["a", "b", "c", "elsewhere"][pick(4) as usize];
                    let want = Want {
                        class: Class::ALL[pick(3) as usize],
                        conversation: Some(pick(5)),
                        deadline: bench.now + Duration::from_millis(pick(20_000)),
                        barred: if pick(6) == 0 { vec![pick(backends as u64) as usize] } else { Vec::new() },
                        ..bench.want(model, ["x", "y", "z"][pick(3) as usize])
                    };
                    waiting.extend(bench.scheduler.arrive(bench.now, want).ok());
                }
                4 if !waiting.is_empty() => {
                    let waiter = waiting.swap_remove(pick(waiting.len() as u64) as usize);
                    bench.scheduler.leave(waiter);
                }
                5 | 6 if !running.is_empty() => {
                    let (run, _) = running.swap_remove(pick(running.len() as u64) as usize);
                    if pick(2) == 0 {
                        bench.scheduler.first_byte(bench.now, run);
                    }
                    let how = [Ended::Left, Ended::Moot, Ended::Complete(Measured::default())];
                    let how = how[pick(3) as usize];
                    bench.scheduler.ended(bench.now, run, how);
                    bench.scheduler.ended(bench.now, run, how); // twice is once
                }
                8 => {
                    let model = ["a", "b", "c", "elsewhere"][pick(4) as usize];
                    let run = bench.scheduler.preload(bench.now, pick(backends as u64) as usize, model);
                    running.extend(run.map(|run| (run, WaiterId(run.0))));
                }
                7 => {
                    let backend = pick(backends as u64) as usize;
                    let state = [State::Up, State::Trial, State::Down, State::Drained][pick(4) as usize];
                    bench.set_state(backend, state);
                    let loaded = names(&["a", "b", "c"][..pick(4) as usize]);
                    bench.scheduler.seen(bench.now, backend, &Inventory { held: None, loaded: Some(&loaded) });
                }
                _ => bench.now += Duration::from_millis(pick(700)),
            }
            bench.poll();
            running.extend(bench.granted.drain(..).map(|grant| (grant.run, grant.waiter)));
            let gone: Vec<WaiterId> = bench.expired.drain(..).chain(bench.nowhere.drain(..)).collect();
            let gave_way: Vec<RunId> = bench.gave_way.drain(..).collect();
            running.retain(|(run, _)| !gave_way.contains(run));
            waiting.retain(|waiter| !gone.contains(waiter) && !running.iter().any(|(_, of)| of == waiter));
            assert_eq!(bench.scheduler.waiting(), waiting.len(), "seed {seed}");
            assert_eq!(bench.scheduler.runs.len(), running.len(), "seed {seed}");
            for model in &bench.scheduler.book.models {
                for cell in &model.cells {
                    assert!(cell.running.len() + cell.lingering <= slots.slots, "seed {seed}: a slot is held twice");
                }
            }
        }
        // At the end everybody ends, and whoever waits is served.
        for backend in 0..backends {
            bench.set_state(backend, State::Up);
        }
        for _ in 0..2000 {
            bench.after(1.0);
            running.extend(bench.granted.drain(..).map(|grant| (grant.run, grant.waiter)));
            let gave_way: Vec<RunId> = bench.gave_way.drain(..).collect();
            running.retain(|(run, _)| !gave_way.contains(run));
            let Some((run, _)) = running.pop() else { continue };
            bench.scheduler.ended(bench.now, run, Ended::Complete(Measured::default()));
        }
        assert_eq!((bench.scheduler.waiting(), bench.scheduler.busy()), (0, 0), "seed {seed}");
        assert!(bench.scheduler.book.backends.iter().all(|backend| backend.in_flight == 0), "seed {seed}");
        assert!(bench.scheduler.agents.is_empty() && bench.scheduler.deadlines.is_empty(), "seed {seed}");
    }
}
