//! Whoever has a certificate can do harm to himself, and to the run no more than a worker's results can.

use mattock_coordinator::event::Event;
use mattock_coordinator::identity::{Identity, JoinToken};
use mattock_coordinator::protocol::{About, Finish, FromCoordinator, FromWorker, Holding, StepReport};
use mattock_coordinator::reach;
use mattock_coordinator::wire;

use crate::peer::{Answer, Peer, certificate};
use crate::run::{Run, Setup, about, report};

fn hello(about: About) -> Vec<u8> {
    wire::encode(&FromWorker::Hello(about)).unwrap()
}

/// The last of two workers: it joins by hand, so that it may lie in the ring.
struct Liar {
    identity: Identity,
    peer: Peer,
    send: quinn::SendStream,
    receive: quinn::RecvStream,
}

impl Liar {
    /// A run in which rank 1 lies.
    fn in_a_run() -> (Run, Self) {
        let mut run = Run::gathering(Setup::default());
        run.add_worker();
        run.expect("the first worker", |event| matches!(event, Event::WorkerJoined { .. }).then_some(()));
        let identity = certificate(&run.token);
        let liar = run.runtime.block_on(async {
            let peer = Peer::with_certificate(&run.token, &identity).await;
            let (send, receive) = peer.say(&hello(about())).await;
            let mut liar = Self { identity: identity.clone(), peer, send, receive };
            liar.tell(&FromWorker::Ready { step: Some(0) }).await;
            // Whoever calls itself linked into a ring before there is one is not listened to.
            liar.hear(|message| matches!(message, FromCoordinator::Form(_))).await;
            liar.tell(&FromWorker::Linked { generation: 1 }).await;
            liar
        });
        (run, liar)
    }

    async fn tell(&mut self, message: &FromWorker) {
        self.send.write_all(&wire::encode(message).unwrap()).await.unwrap();
    }

    /// Waits for a message of the coordinator.
    async fn hear(&mut self, wanted: impl Fn(&FromCoordinator) -> bool) {
        loop {
            let mut header = [0; wire::HEADER_BYTES];
            self.receive.read_exact(&mut header).await.unwrap();
            let mut archive = vec![0; wire::decode_header(header).unwrap()];
            self.receive.read_exact(&mut archive).await.unwrap();
            if wanted(&wire::decode(&archive).unwrap()) {
                return;
            }
        }
    }
}

/// Sent away, it goes on to report in the name of both ranks, with states that nobody has.
#[test]
fn who_was_sent_away_reports_nothing() {
    let run = Run::training();
    let identity = certificate(&run.token);
    let mut lies = hello(about());
    for step in 1_000..1_040 {
        for rank in 0..2 {
            lies.extend(wire::encode(&FromWorker::Step(report(1, rank, 2, step))).unwrap());
        }
    }
    let finish = Finish {
        step: 9,
        completed: true,
        state_hash: 1,
        held_out_loss: None,
        unigram_loss: None,
        parameters: 1,
    };
    lies.extend(wire::encode(&FromWorker::Finished(finish)).unwrap());
    let notice = FromWorker::Notice { text: "a lie".to_owned() };
    lies.extend(wire::encode(&notice).unwrap());
    let answer = run
        .runtime
        .block_on(async { Peer::with_certificate(&run.token, &identity).await.greet(&lies).await });
    let Answer::Message(archive) = answer else { panic!("{answer:?}") };
    let refused = wire::decode::<FromCoordinator>(&archive).unwrap();
    assert!(
        matches!(&refused, FromCoordinator::Refused { reason } if reason.contains("has its 2 workers")),
        "{refused:?}"
    );
    run.expect_refusal(&["has its 2 workers"]);
    run.advance(20);
    let noticed = run.events().iter().any(|event| format!("{event:?}").contains("a lie"));
    assert!(!noticed, "whoever was sent away is not heard");
    run.finish();
}

/// Who shows a member's certificate while the member is connected is refused, and the member's reports still count.
#[test]
fn a_certificate_is_for_one_connection() {
    let (run, mut liar) = Liar::in_a_run();
    let reason = run.runtime.block_on(async {
        liar.hear(|message| matches!(message, FromCoordinator::Start { .. })).await;
        Peer::with_certificate(&run.token, &liar.identity).await.ask(&hello(about())).await.closed()
    });
    assert!(reason.contains("worker 1 is connected already"), "{reason}");
    run.expect_refusal(&["127.0.0.1", "worker 1 is connected already"]);
    run.runtime.block_on(liar.tell(&FromWorker::Step(report(1, 1, 2, 1))));
    run.advance(1);
}

#[test]
fn what_a_worker_says_of_itself_is_checked() {
    let run = Run::training();
    let identity = certificate(&run.token);
    let mistakes = [
        (About { host: "\x1b[2Jclean".to_owned(), ..about() }, "cannot be printed"),
        (About { host: "h".repeat(2000), ..about() }, "2000 bytes, 1024 are allowed"),
        (About { fingerprint: "f".repeat(5000), ..about() }, "5000 bytes"),
        (About { address: "nowhere".to_owned(), ..about() }, "give IP:PORT"),
    ];
    for (about, words) in mistakes {
        let reason = run.runtime.block_on(async {
            let peer = Peer::with_certificate(&run.token, &identity).await;
            peer.ask(&hello(about)).await.closed()
        });
        assert!(reason.contains(words), "{words:?} should be said, not {reason:?}");
        run.expect_refusal(&["worker 2", words]);
    }
    run.finish();
}

#[test]
fn who_does_not_say_hello_is_refused() {
    let run = Run::training();
    let identity = certificate(&run.token);
    let ready = wire::encode(&FromWorker::Ready { step: Some(0) }).unwrap();
    let reason = run
        .runtime
        .block_on(async { Peer::with_certificate(&run.token, &identity).await.ask(&ready).await.closed() });
    assert!(reason.contains("did not say hello"), "{reason}");
    run.expect_refusal(&["worker 2 did not say hello"]);
    run.finish();
}

/// A member's report in another's name, or larger than any that is true, costs it its place; the run goes on, and
/// nothing false is recorded.
#[test]
fn a_members_lies_are_named() {
    let honest = report(1, 1, 2, 1);
    let lies = [
        (report(1, 0, 2, 1), "as rank 0, which it is not"),
        (StepReport { micro_batches: vec![1; 5], ..honest.clone() }, "5 micro-batches in a step of 4"),
        (
            StepReport { seconds: vec![(String::new(), 0.0); 65], ..honest.clone() },
            "more than 64 phases or kinds",
        ),
        (StepReport { seconds: vec![("p".repeat(65), 0.0)], ..honest }, "longer names"),
    ];
    for (lie, words) in lies {
        let (run, mut liar) = Liar::in_a_run();
        run.runtime.block_on(async {
            liar.hear(|message| matches!(message, FromCoordinator::Start { .. })).await;
            liar.tell(&FromWorker::Step(lie)).await;
            liar.hear(|message| matches!(message, FromCoordinator::End { .. })).await;
        });
        let reason = run.expect_loss(1);
        assert!(reason.contains(words), "{reason}");
        run.finish();
    }
}

/// A member that talks nonsense is lost, both it and an event say why, and the run goes on.
#[test]
fn a_member_that_talks_nonsense_is_lost() {
    let (run, mut liar) = Liar::in_a_run();
    let told = run.runtime.block_on(async {
        liar.hear(|message| matches!(message, FromCoordinator::Start { .. })).await;
        let mut nonsense = wire::encode(&FromWorker::Step(report(1, 1, 2, 1))).unwrap();
        nonsense[wire::HEADER_BYTES..].fill(0xff);
        liar.send.write_all(&nonsense).await.unwrap();
        liar.peer.closed().await
    });
    assert!(told.contains("is damaged"), "{told}");
    run.expect_refusal(&["worker 1", "is damaged"]);
    let reason = run.expect_loss(1);
    assert!(reason.contains("is damaged"), "{reason}");
    run.finish();
}

/// A member that is gone, in the middle of a step, costs the run no step; who takes its place trains with the others.
#[test]
fn a_lost_member_is_replaced() {
    let (mut run, mut liar) = Liar::in_a_run();
    run.runtime.block_on(async {
        liar.hear(|message| matches!(message, FromCoordinator::Start { .. })).await;
        liar.tell(&FromWorker::Step(report(1, 1, 2, 1))).await;
    });
    run.advance(1);
    run.runtime.block_on(async {
        liar.peer.connection.close(0u32.into(), b"killed");
    });
    run.expect_loss(1);
    run.advance(3);
    run.add_worker();
    run.expect("a ring of two", |event| {
        matches!(event, Event::RingFormed { generation: 3, world_size: 2 }).then_some(())
    });
    run.finish();
}

/// A member that says it leaves is let go, and the run goes on.
#[test]
fn a_member_leaves() {
    let (run, mut liar) = Liar::in_a_run();
    run.runtime.block_on(async {
        liar.hear(|message| matches!(message, FromCoordinator::Start { .. })).await;
        liar.tell(&FromWorker::Leaving { reason: "its host is needed".to_owned() }).await;
        liar.hear(|message| matches!(message, FromCoordinator::Recall { generation: 1, .. })).await;
        liar.tell(&FromWorker::Held { generation: 1, holding: Holding::at(0) }).await;
        liar.hear(|message| matches!(message, FromCoordinator::Released { .. })).await;
    });
    let left = |event: &Event| matches!(event, Event::WorkerLeft { worker: 1, .. }).then_some(());
    run.expect("the leave of worker 1", left);
    run.finish();
}

/// An answer to a recall that claims more than there is, or a state that its sender has not reported, costs it its place.
#[test]
fn a_holding_that_cannot_be_is_no_answer() {
    let lies = [
        (Holding { done: vec![0; 5], ..Holding::at(0) }, "5 micro-batches of a step of 4"),
        (Holding::at(7), "which it has not reported"),
    ];
    for (holding, words) in lies {
        let (run, mut liar) = Liar::in_a_run();
        run.runtime.block_on(async {
            liar.hear(|message| matches!(message, FromCoordinator::Start { .. })).await;
            liar.tell(&FromWorker::Held { generation: 1, holding }).await;
            liar.hear(|message| matches!(message, FromCoordinator::End { .. })).await;
        });
        let reason = run.expect_loss(1);
        assert!(reason.contains(words), "{reason}");
        run.finish();
    }
}

/// Two hosts may have processes of one number: the end of the one is not that of the other's.
#[test]
fn a_process_that_ended_is_one_of_its_host() {
    let run = Run::training();
    let About { host, pid, .. } = about();
    run.process_exited("another host", pid, "first");
    run.process_exited(&host, pid, "second");
    let reason = run.expect("a loss", |event| match event {
        Event::WorkerLost { reason, .. } => Some(reason.clone()),
        _ => None,
    });
    assert!(reason.contains("second"), "{reason}");
}

/// Whoever looks whether the coordinator can be reached disturbs nobody; with another run's token he is told so.
#[test]
fn a_look_from_outside_is_no_worker() {
    let run = Run::training();
    let found = reach(&run.token, run.token.timeout()).unwrap();
    assert!(found.local_ip.is_loopback() && found.datagram_bytes >= 1200, "{found:?}");
    let text = run.token.to_string();
    let secret =
        serde_json::from_str::<serde_json::Value>(&text).unwrap()["secret"].as_str().unwrap().to_owned();
    let other = JoinToken::parse(&text.replace(&secret, &"00".repeat(32))).unwrap();
    let refused = reach(&other, other.timeout()).unwrap_err().to_string();
    assert!(refused.contains("not this run's"), "{refused}");
    run.advance(3);
    let joined = |event: &&Event| matches!(event, Event::WorkerJoined { .. } | Event::RingRecalled { .. });
    assert_eq!(run.events().iter().filter(joined).count(), 2);
    run.finish();
}
