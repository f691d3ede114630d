use super::*;

const SETTINGS: GuessSettings = GuessSettings { requests_per_minute: 300, wrong_secrets_per_minute: 10 };
const NOW: Duration = Duration::from_secs(1_000);

fn address(n: u32) -> IpAddr {
    IpAddr::V4((0x0a00_0000 + n).into())
}

/// A wrong secret: whether it was even checked.
fn wrong(guesses: &Guesses, from: IpAddr, id: &str, now: Duration) -> Result<(), Slowed> {
    guesses.arrive(from, id, now).and_then(|arrival| guesses.guess(arrival, now)).map(drop)
}

fn right(guesses: &Guesses, from: IpAddr, id: &str, now: Duration) -> Result<(), Slowed> {
    let guess = guesses.arrive(from, id, now).and_then(|arrival| guesses.guess(arrival, now))?;
    guesses.proved(guess, now);
    Ok(())
}

/// How many wrong secrets are checked before the first that is not.
fn checked(guesses: &Guesses, from: IpAddr, id: &str, now: Duration) -> usize {
    (0..10_000).take_while(|_| wrong(guesses, from, id, now).is_ok()).count()
}

#[test]
fn a_hundred_agents_behind_one_address_fetch_their_tokens_at_once() {
    let guesses = Guesses::new(SETTINGS);
    for n in 0..100 {
        assert_eq!(right(&guesses, address(1), &format!("agent-{n}"), NOW), Ok(()), "agent {n}");
    }
    for n in 0..100 {
        assert_eq!(right(&guesses, address(1), "one-for-all", NOW), Ok(()), "process {n} of one agent");
    }
}

#[test]
fn wrong_secrets_for_one_id_are_slowed_to_a_steady_rate_that_retry_after_tells() {
    let guesses = Guesses::new(SETTINGS);
    assert_eq!(checked(&guesses, address(1), "a", NOW), 10);
    let Err(Slowed::Client { retry_after_s }) = wrong(&guesses, address(1), "a", NOW) else { panic!("not slowed") };
    assert_eq!(retry_after_s, 6);
    let later = NOW + Duration::from_secs(6);
    assert_eq!(checked(&guesses, address(1), "a", later), 1, "whoever waits as told gets one");
    assert_eq!(checked(&guesses, address(1), "a", NOW + Duration::from_secs(3_600)), 10, "and no more is saved up");
}

#[test]
fn an_address_is_slowed_whatever_ids_it_tries_and_whatever_comes_of_it() {
    let guesses = Guesses::new(SETTINGS);
    let tried = (0..1_000).take_while(|n| wrong(&guesses, address(1), &format!("id-{n}"), NOW).is_ok()).count();
    assert_eq!(tried, 300);
    assert_eq!(wrong(&guesses, address(1), "another", NOW), Err(Slowed::Address { retry_after_s: 1 }));
    assert_eq!(wrong(&guesses, address(2), "another", NOW), Ok(()), "another address is not");

    // A secret of one's own pays for no guess at others'.
    let guesses = Guesses::new(SETTINGS);
    let tried = (0..1_000)
        .take_while(|n| {
            let _ = right(&guesses, address(1), "mine", NOW);
            wrong(&guesses, address(1), &format!("id-{n}"), NOW).is_ok()
        })
        .count();
    assert_eq!(tried, 150);
}

#[test]
fn an_id_is_slowed_over_all_addresses_too() {
    let guesses = Guesses::new(SETTINGS);
    let guessed: usize = (0..50).map(|n| checked(&guesses, address(n), "a", NOW)).sum();
    assert_eq!(guessed, 60);
    assert_eq!(wrong(&guesses, address(60), "a", NOW), Err(Slowed::Client { retry_after_s: 1 }));
}

#[test]
fn who_guesses_at_an_id_does_not_lock_its_owner_out() {
    let guesses = Guesses::new(SETTINGS);
    assert_eq!(right(&guesses, address(1), "a", NOW), Ok(()));
    for n in 2..50 {
        checked(&guesses, address(n), "a", NOW);
    }
    assert!(wrong(&guesses, address(99), "a", NOW).is_err(), "the id's allowance is used up");
    for _ in 0..100 {
        assert_eq!(right(&guesses, address(1), "a", NOW), Ok(()), "it is familiar at its own address");
    }

    // One that guesses, and an owner that was never seen: most of the allowance is left.
    let guesses = Guesses::new(SETTINGS);
    checked(&guesses, address(2), "b", NOW);
    assert_eq!(right(&guesses, address(1), "b", NOW), Ok(()));
}

#[test]
fn a_neighbour_behind_the_same_address_does_not_lock_a_familiar_agent_out() {
    let guesses = Guesses::new(SETTINGS);
    assert_eq!(right(&guesses, address(1), "a", NOW), Ok(()));
    for n in 0..400 {
        let _ = wrong(&guesses, address(1), &format!("id-{n}"), NOW);
    }
    assert!(matches!(wrong(&guesses, address(1), "b", NOW), Err(Slowed::Address { .. })));
    assert_eq!(right(&guesses, address(1), "a", NOW), Ok(()));
    // The way in is no way round: it has a bound of its own, which right secrets use up as well.
    let passed = (0..100).take_while(|_| right(&guesses, address(1), "a", NOW).is_ok()).count();
    assert_eq!(passed, 9);
}

#[test]
fn a_wrong_secret_makes_nothing_familiar_and_being_familiar_buys_no_guesses() {
    let guesses = Guesses::new(SETTINGS);
    let _ = wrong(&guesses, address(1), "a", NOW);
    assert!(!guesses.state.lock().is_familiar(address(1), "a"));
    assert_eq!(right(&guesses, address(1), "a", NOW), Ok(()));
    assert!(guesses.state.lock().is_familiar(address(1), "a"));
    assert_eq!(checked(&guesses, address(1), "a", NOW), 9, "with the one before, as many as a stranger");
}

#[test]
fn a_flood_of_ids_and_addresses_neither_grows_the_tables_nor_forgets_an_id_that_was_guessed_at() {
    let guesses = Guesses::new(SETTINGS);
    checked(&guesses, address(1), "victim", NOW);
    let size = || guesses.state.lock().clients_at_addresses.rows.iter().map(|(_, slots)| slots.len()).sum::<usize>();
    let before = size();
    // 100 wrong secrets a second, which is what two hashes at once can check, for five seconds, each a new id and address.
    for n in 0..500 {
        let now = NOW + Duration::from_millis(u64::from(n) * 10);
        assert_eq!(
            wrong(&guesses, address(1_000 + n), &format!("id-{n}"), now),
            Ok(()),
            "no stranger waits for another"
        );
    }
    assert_eq!(size(), before);
    assert!(guesses.state.lock().familiar.is_empty(), "strangers leave nothing there");
    let five = NOW + Duration::from_secs(5);
    assert!(wrong(&guesses, address(1), "victim", five).is_err(), "its six seconds are not over");
}

#[test]
fn what_is_familiar_is_bounded_and_one_agent_cannot_push_out_the_others() {
    let guesses = Guesses::new(GuessSettings { requests_per_minute: 1_000_000, ..SETTINGS });
    assert_eq!(right(&guesses, address(1), "first", NOW), Ok(()));
    for n in 0..1_000 {
        right(&guesses, address(n), "wanderer", NOW).unwrap();
    }
    assert!(guesses.state.lock().is_familiar(address(1), "first"));
    assert_eq!(guesses.state.lock().familiar["wanderer"].len(), FAMILIAR_ADDRESSES);
    for n in 0..5_000 {
        right(&guesses, address(2), &format!("agent-{n}"), NOW + Duration::from_millis(1 + n)).unwrap();
    }
    let state = guesses.state.lock();
    assert_eq!(state.familiar.len(), FAMILIAR_IDS);
    assert!(state.is_familiar(address(2), "agent-4999") && !state.is_familiar(address(1), "first"));
}

#[test]
fn addresses_of_one_ipv6_network_are_one_and_ipv4_in_ipv6_is_ipv4() {
    let guesses = Guesses::new(SETTINGS);
    let v6 = |n: u16| IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 1, n, 0, 0, n));
    let guessed: usize = (0..50).map(|n| checked(&guesses, v6(n), "a", NOW)).sum();
    assert_eq!(guessed, 10);
    let mapped: IpAddr = "::ffff:10.0.0.1".parse().unwrap();
    assert_eq!(network(mapped), address(1));
    let (ours, theirs): (IpAddr, IpAddr) = ("::1".parse().unwrap(), "::2".parse().unwrap());
    assert_ne!(network(ours), network(theirs), "loopback is nobody's /64");
}

#[test]
fn no_time_and_no_setting_makes_it_panic() {
    for per_minute in [0, 1, 1_000_000, u32::MAX] {
        let guesses =
            Guesses::new(GuessSettings { requests_per_minute: per_minute, wrong_secrets_per_minute: per_minute });
        for now in [Duration::ZERO, NOW, Duration::from_secs(1), Duration::from_secs(500 * 365 * 86_400)] {
            let _ = right(&guesses, address(1), "a", now);
            let _ = wrong(&guesses, address(1), "", now);
        }
    }
}
