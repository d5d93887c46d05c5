//! Whoever says nothing, too much, or takes nothing keeps nobody else waiting.

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use mattock_coordinator::event::Event;
use mattock_coordinator::identity::ENROLL_ALPN;
use mattock_coordinator::protocol::FromWorker;
use mattock_coordinator::{Client, ServerError, wire};
use quinn::TransportConfig;

use crate::peer::{Peer, anonymous, certificate, member};
use crate::relay::Dice;
use crate::run::{LONG, PATIENT, Run, SHORT, Setup, about, config};

/// More than may be at the door at once.
const SILENT: usize = 70;

/// All places at the door are taken by callers who say nothing: workers come in nevertheless, and each of the silent ones
/// is told why it has to go.
#[test]
fn silent_strangers_keep_nobody_out() {
    let run = Run::gathering(Setup { timeout: SHORT, ..Setup::default() });
    let silent: Vec<Peer> = run.runtime.block_on(async {
        let mut silent = Vec::new();
        for _ in 0..SILENT {
            silent.push(Peer::stranger(&run.token).await);
        }
        silent
    });
    let run = run.trained();
    let reasons: Vec<String> = run.runtime.block_on(async {
        let mut reasons = Vec::new();
        for peer in &silent {
            reasons.push(peer.closed().await);
        }
        reasons
    });
    let said = |words: &str| reasons.iter().filter(|reason| reason.contains(words)).count();
    let (displaced, overdue) =
        (said("too many others wanted to: try again"), said("did not introduce itself within"));
    assert!(displaced > 0 && overdue > 0, "{displaced} displaced, {overdue} overdue: {reasons:?}");
    assert_eq!(displaced + overdue, SILENT, "{reasons:?}");
    run.expect_refusal(&["127.0.0.1", "did not introduce itself within"]);
    run.expect_refusal(&["127.0.0.1", "too many others"]);
    run.finish();
}

/// A stream is opened and a message begun, but never ended.
#[test]
fn half_a_message_is_not_waited_for() {
    let run = Run::gathering(Setup { timeout: SHORT, ..Setup::default() }).trained();
    let identity = certificate(&run.token);
    let hello = wire::encode(&FromWorker::Hello(about())).unwrap();
    let reason = run.runtime.block_on(async {
        let peer = Peer::with_certificate(&run.token, &identity).await;
        let _open = peer.say(&hello[..hello.len() - 1]).await;
        peer.closed().await
    });
    assert!(
        reason.contains(&format!("within {SHORT:?}"))
            || reason.contains(&format!("no message for {SHORT:?}")),
        "{reason}"
    );
    run.expect_refusal(&["127.0.0.1", &format!("{SHORT:?}")]);
    run.finish();
}

/// Datagrams that are no QUIC, or nearly.
#[test]
fn garbage_at_the_port_is_ignored() {
    let run = Run::training();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut dice = Dice(7);
    for round in 0..3000 {
        let length = if round % 3 == 0 { 1200 } else { dice.below(1500) as usize };
        let mut garbage: Vec<u8> = (0..length).map(|_| dice.next() as u8).collect();
        if round % 2 == 0 && length > 40 {
            // A first packet of QUIC version 1, as far as its first bytes go.
            garbage[..6].copy_from_slice(&[0xc0 | (dice.next() as u8 & 0x0f), 0, 0, 0, 1, 8]);
        }
        // The kernel may have no room for it.
        let _ = socket.send_to(&garbage, run.token.address);
    }
    assert!(Client::enroll(&run.token, LONG).is_ok(), "the door still opens");
    run.finish();
}

/// One worker reports as fast as it can, as long as the others take 30 steps.
#[test]
fn a_worker_that_floods_delays_nobody() {
    let run = Run::training();
    let flooding = Arc::new(AtomicBool::new(true));
    let (go_on, token) = (Arc::clone(&flooding), run.token.clone());
    // A place in the ring is not to be had any more; the flood comes through the same queue.
    let identity = certificate(&token);
    let flood = run.runtime.spawn(async move {
        let hello = wire::encode(&FromWorker::Hello(about())).unwrap();
        let text = "x".repeat(60_000);
        let burst = wire::encode(&FromWorker::Notice { text }).unwrap().repeat(16);
        let mut calls = 0;
        while go_on.load(Ordering::SeqCst) {
            let peer = Peer::with_certificate(&token, &identity).await;
            let (mut send, _receive) = peer.say(&hello).await;
            while send.write_all(&burst).await.is_ok() {}
            calls += 1;
        }
        calls
    });
    run.advance(30);
    flooding.store(false, Ordering::SeqCst);
    let calls = run.runtime.block_on(async { tokio::time::timeout(PATIENT, flood).await });
    assert!(calls.unwrap().unwrap() > 0);
    run.expect_refusal(&["has its 2 workers"]);
    run.finish();
}

/// A member of the ring floods, and the other's steps are recorded nevertheless.
#[test]
fn a_member_that_floods_delays_nobody() {
    let mut run = Run::gathering(Setup { events_max: 16, ..Setup::default() });
    run.add_flooding_worker();
    let run = run.trained();
    run.advance(10);
    let noticed = run.events().iter().filter(|event| matches!(event, Event::Notice { .. })).count();
    assert!(noticed > 100, "it did flood: {noticed}");
    run.finish();
}

/// It speaks, and takes nothing that it is told.
#[test]
fn a_worker_that_takes_no_messages_is_not_kept() {
    let run = Run::gathering(Setup { timeout: SHORT, ..Setup::default() }).trained();
    let identity = certificate(&run.token);
    let mut config = member(&identity);
    let mut transport = TransportConfig::default();
    transport.stream_receive_window(1u32.into());
    config.transport_config(Arc::new(transport));
    let reason = run.runtime.block_on(async {
        let peer = Peer::dial(&run.token, config).await.unwrap();
        let (mut send, _receive) = peer.say(&wire::encode(&FromWorker::Hello(about())).unwrap()).await;
        let heartbeat = wire::encode(&FromWorker::Heartbeat).unwrap();
        while send.write_all(&heartbeat).await.is_ok() {
            tokio::time::sleep(SHORT / 8).await;
        }
        peer.closed().await
    });
    assert!(reason.contains(&format!("no message for {SHORT:?}")), "{reason}");
    run.finish();
}

/// Events may be read late: a terminal that is stopped for a while costs no worker.
#[test]
fn who_reads_events_late_costs_no_worker() {
    let run = Run::gathering(Setup { timeout: SHORT, events_max: 2, ..Setup::default() }).trained();
    run.pause_reading(true);
    std::thread::sleep(SHORT * 2);
    run.pause_reading(false);
    run.finish();
}

/// Otherwise every worker would be turned away, each for no fault of its own.
#[test]
fn a_recipe_that_no_message_can_carry_is_refused_at_once() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut config = config(Setup::default());
    config.recipe = "#".repeat(wire::MESSAGE_BYTES_MAX);
    let refused = runtime.block_on(mattock_coordinator::Server::bind(config)).unwrap_err();
    assert!(
        matches!(refused, ServerError::Recipe(_)) && refused.to_string().contains("over the limit"),
        "{refused}"
    );
}

/// Nobody is told more often than a terminal can show; what is left out is counted.
#[test]
fn many_refusals_are_summed_up() {
    let run = Run::gathering(Setup { timeout: LONG / 2, ..Setup::default() }).trained();
    let config = anonymous(&run.token, ENROLL_ALPN);
    let summed_up =
        |event: &Event| matches!(event, Event::WorkerRefused { reason } if reason.contains("more before it"));
    let deadline = Instant::now() + PATIENT;
    while !run.events().iter().any(summed_up) {
        assert!(Instant::now() < deadline, "every one of so many was told of");
        run.runtime.block_on(async {
            let peer = Peer::dial(&run.token, config.clone()).await.unwrap();
            assert!(peer.ask(b"GET / HTTP/1.1\r\n\r\n").await.closed().contains("does not speak"));
        });
    }
    run.finish();
}
