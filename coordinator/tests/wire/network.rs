//! What somebody on the way sees, and can spoil.

use mattock_coordinator::event::Event;
use mattock_coordinator::protocol::FromWorker;
use mattock_coordinator::wire::{self, HEADER_BYTES};

use crate::peer::{secret, with_field};
use crate::relay::{Relay, Weather, holds};
use crate::run::{HOST, RECIPE, Run, SHORT, Setup, about};

/// Lets both workers come by relays of their own, one after the other.
fn by_way_of(run: &mut Run, weather: Weather) -> Vec<Relay> {
    let relays: Vec<_> = (1..3).map(|seed| Relay::with(run.token.address, weather, seed)).collect();
    for relay in &relays {
        let token = with_field(&run.token, "address", &relay.address().to_string());
        let before = run.events().len();
        run.add_worker_with(&token);
        run.expect_after(before, "a worker", |event| {
            matches!(event, Event::WorkerJoined { .. }).then_some(())
        });
    }
    relays
}

/// A whole run, from the join token to its end: nothing of what was said can be read on the way.
#[test]
fn no_plaintext_of_control_traffic() {
    let mut run = Run::gathering(Setup::default());
    let relays = by_way_of(&mut run, Weather::default());
    let run = run.trained();
    run.advance(20);
    let hello = wire::encode(&FromWorker::Hello(about())).unwrap();
    let secrets: [(&str, Vec<u8>); 3] = [
        ("the join secret", secret(&run.token)),
        ("the recipe", RECIPE.into()),
        ("a host's name", HOST.into()),
    ];
    run.finish();
    assert!(holds(&hello, HOST.as_bytes()), "in the clear it would be found");
    for relay in &relays {
        let (seen, (up, down)) = (relay.seen(), relay.carried());
        // Each of 20 steps is told of in a message of its own, and the recipe came back.
        assert!(up > 20 * HEADER_BYTES as u64 && down > RECIPE.len() as u64, "all of it went by the relay");
        for (what, bytes) in &secrets {
            assert!(!holds(&seen, bytes), "{what} can be read on the way");
        }
    }
}

/// Datagrams are flipped, dropped, doubled and overtaken: the run does not notice.
#[test]
fn a_bad_network_changes_nothing() {
    let mut run = Run::gathering(Setup::default());
    let relays = by_way_of(&mut run, Weather::BAD);
    let run = run.trained();
    run.advance(100);
    run.finish();
    for relay in &relays {
        assert!(relay.mistreated() > 0, "nothing happened to {:?} bytes", relay.carried());
    }
}

/// Somebody cuts the line: whoever is behind it is lost after one timeout, for a reason, and the others go on.
#[test]
fn a_line_that_is_cut_costs_the_run_no_step() {
    let mut run = Run::gathering(Setup { timeout: SHORT, ..Setup::default() });
    let relays = by_way_of(&mut run, Weather::default());
    let mut run = run.trained();
    relays[1].fall_silent();
    let reason = run.expect_loss(1);
    let words = [
        format!("nothing was heard of it for {SHORT:?}"),
        format!("no message for {SHORT:?}"),
        "fell silent".to_owned(),
    ];
    assert!(words.iter().any(|words| reason.contains(words)), "{reason}");
    assert!(run.remove_worker(1).is_err(), "it knows that it is alone");
    run.finish();
}
