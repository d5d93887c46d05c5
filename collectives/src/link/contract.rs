//! The contract of a link as tests, run over every implementation.

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;

use super::faulty::{Faults, Faulty};
use super::{LinkReceiver, LinkSender, memory};
use crate::error::TransportError;
use crate::node::{Node, links};

#[path = "../../tests/common/mod.rs"]
mod common;

/// Far longer than anything here takes.
const LIMIT: Duration = Duration::from_secs(30);

async fn in_time<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, what).await.expect("a link does not hang")
}

fn pattern(len: usize) -> Bytes {
    (0..len).map(|i| (i * 31 % 251) as u8).collect::<Vec<_>>().into()
}

async fn read_all(receiver: &mut impl LinkReceiver) -> Result<Vec<u8>, TransportError> {
    let mut all = Vec::new();
    while let Some(piece) = receiver.receive().await? {
        assert!(!piece.is_empty(), "a piece is never empty");
        all.extend_from_slice(&piece);
    }
    Ok(all)
}

async fn what_was_sent_arrives_whole_then_the_stream_ends(
    mut sender: impl LinkSender,
    mut receiver: impl LinkReceiver,
) {
    let sent = pattern(3_000_000);
    let send = async {
        for length in [1, 0, 70_000, 13].into_iter().cycle().scan(0, |at, length| {
            *at += length;
            Some((*at - length, *at))
        }) {
            let (start, end) = (length.0.min(sent.len()), length.1.min(sent.len()));
            sender.send(sent.slice(start..end)).await.unwrap();
            if end == sent.len() {
                break;
            }
        }
        sender.finish().await.unwrap();
    };
    let ((), received) = tokio::join!(send, read_all(&mut receiver));
    assert!(received.unwrap() == sent, "the same bytes in the same order");
    assert_eq!(receiver.receive().await, Ok(None), "the end stays the end");
    sender.send(pattern(1)).await.expect_err("a finished link takes nothing more");
}

async fn a_full_link_makes_its_sender_wait(mut sender: impl LinkSender, receiver: impl LinkReceiver) {
    let chunk = pattern(1 << 20);
    let flood = async {
        for _ in 0..200 {
            sender.send(chunk.clone()).await.unwrap();
        }
    };
    // The one wait in this suite that is meant to run out.
    assert!(tokio::time::timeout(Duration::from_millis(300), flood).await.is_err(), "200 MB fit into a link");
    drop(receiver);
}

async fn a_sender_that_breaks_off_says_why(mut sender: impl LinkSender, mut receiver: impl LinkReceiver) {
    sender.send(pattern(10)).await.unwrap();
    sender.break_off("the roof is on fire");
    let end = read_all(&mut receiver).await.unwrap_err();
    assert_eq!(end, TransportError::BrokenOff { reason: "the roof is on fire".into() });
    assert_eq!(receiver.receive().await, Err(end), "the end stays the end");
    assert_eq!(sender.send(pattern(1)).await, Err(TransportError::ClosedHere));
}

async fn a_receiver_that_breaks_off_says_why(mut sender: impl LinkSender, mut receiver: impl LinkReceiver) {
    receiver.break_off("no more room");
    let reason = TransportError::BrokenOff { reason: "no more room".into() };
    assert_eq!(sender.closed().await, reason);
    assert_eq!(sender.send(pattern(1)).await, Err(reason.clone()));
    assert_eq!(sender.finish().await, Err(reason));
    assert_eq!(receiver.receive().await, Err(TransportError::ClosedHere));
}

async fn a_receiver_that_closes_ends_the_link_in_order(
    mut sender: impl LinkSender,
    mut receiver: impl LinkReceiver,
) {
    receiver.close();
    assert_eq!(sender.closed().await, TransportError::ClosedByPeer);
    assert_eq!(sender.send(pattern(1)).await, Err(TransportError::ClosedByPeer));
    assert_eq!(sender.finish().await, Ok(()));
}

async fn halves_that_vanish_are_missed(sender: impl LinkSender, mut receiver: impl LinkReceiver) {
    drop(sender);
    assert!(matches!(receiver.receive().await, Err(TransportError::BrokenOff { .. })));
}

async fn waiting_for_a_piece_may_be_given_up(mut sender: impl LinkSender, mut receiver: impl LinkReceiver) {
    for _ in 0..3 {
        tokio::select! {
            biased;
            piece = receiver.receive() => panic!("nothing was sent, {piece:?} received"),
            () = tokio::task::yield_now() => {}
        }
    }
    let sent = pattern(1000);
    let send = async {
        sender.send(sent.clone()).await.unwrap();
        sender.finish().await.unwrap();
    };
    let ((), received) = tokio::join!(send, read_all(&mut receiver));
    assert_eq!(received.unwrap(), sent);
}

/// Nodes that live as long as the test, and the link from the first to the second.
async fn quic() -> (Vec<Node>, impl LinkSender, impl LinkReceiver) {
    let nodes = common::Authority::new().nodes(2, common::config(LIMIT));
    let (first, second) = (common::spec(&nodes, 0, 0), common::spec(&nodes, 1, 0));
    let (first, second) = tokio::join!(links(&nodes[0], first), links(&nodes[1], second));
    (nodes, first.0, second.1)
}

async fn in_memory() -> (Vec<Node>, impl LinkSender, impl LinkReceiver) {
    let (sender, receiver) = memory::link();
    (Vec::new(), sender, receiver)
}

async fn in_memory_in_short_pieces() -> (Vec<Node>, impl LinkSender, impl LinkReceiver) {
    let (sender, receiver) = memory::link();
    let faults = Faults { piece_bytes_max: Some(777), ..Faults::default() };
    (Vec::new(), Faulty::new(sender, faults), receiver)
}

macro_rules! contract {
    ($link:ident: $($claim:ident),+ $(,)?) => {
        mod $link {
            $(#[tokio::test]
            async fn $claim() {
                let (keep, sender, receiver) = super::in_time(super::$link()).await;
                super::in_time(super::$claim(sender, receiver)).await;
                drop(keep);
            })+
        }
    };
}

macro_rules! contracts {
    ($($link:ident),+) => {
        $(contract!(
            $link:
            what_was_sent_arrives_whole_then_the_stream_ends,
            a_full_link_makes_its_sender_wait,
            a_sender_that_breaks_off_says_why,
            a_receiver_that_breaks_off_says_why,
            a_receiver_that_closes_ends_the_link_in_order,
            halves_that_vanish_are_missed,
            waiting_for_a_piece_may_be_given_up,
        );)+
    };
}

contracts!(in_memory, in_memory_in_short_pieces, quic);
