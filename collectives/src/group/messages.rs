//! Messages from one rank to another: what goes in, what comes out, and what makes no sense.

use std::sync::Arc;

use super::Group;
use super::order::too_many;
use crate::buffer::Buffer;
use crate::error::CollectiveError;
use crate::message::letters::{Into, Letter};
use crate::message::post::Post;
use crate::pending::Pending;
use crate::rank::Rank;
use crate::reduction::Element;

impl Group {
    /// Sends elements to one other rank, which [`receive`](Self::receive)s them under the same tag; done when it has them all.
    ///
    /// No other rank takes part, and nothing that ranks do together waits for it, or goes before it. Messages with one tag between
    /// two ranks are received in the order in which they were sent; other tags do not wait for them. As many may be under way as
    /// operations ([`PENDING_MAX`](crate::PENDING_MAX)): what nobody has asked for stays here, but for small messages (16 KiB),
    /// of which a megabyte may go ahead. A rank of the same host reads large ones where they lie, or in a copy of them where they do
    /// not lie in memory of [`buffer`](Self::buffer).
    ///
    /// # Errors
    /// When waited for. [`CollectiveError::Mismatch`] where the other rank asked for other elements, or another length: that ends
    /// this message, and nothing else. [`CollectiveError::InvalidInput`] where there is no such other rank.
    /// [`CollectiveError::TimedOut`] where nothing has moved between the two ranks for the group's timeout, and the others as
    /// for any operation: they end the group.
    pub fn send<E: Element>(&self, to: Rank, tag: u32, input: Arc<Buffer<E>>) -> Pending<()> {
        let post = match self.post_for(to) {
            Ok(post) => post,
            Err(refused) => return Pending::failed(refused),
        };
        let (recorder, bytes) = (self.recorder.clone(), size_of_val(&input[..]) as u64);
        let (input, lies_at) = post.place(to, input);
        post.send(to, tag, |at| {
            let (resolve, pending) = Pending::new(CollectiveError::Closed { at });
            recorder.begin(at.op, bytes);
            let told = Box::new(move |outcome| {
                recorder.end(at.op, &outcome);
                // Who dropped its `Pending` does not want to know.
                let _ = resolve.send(outcome);
            });
            (Letter::of(input, lies_at, told), pending)
        })
        .unwrap_or_else(|at| Pending::failed(too_many(at)))
    }

    /// Receives what another rank [`send`](Self::send)s under this tag: exactly as many elements as `output` is long.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub fn receive<E: Element>(&self, from: Rank, tag: u32, output: Buffer<E>) -> Pending<Buffer<E>> {
        let post = match self.post_for(from) {
            Ok(post) => post,
            Err(refused) => return Pending::failed(refused),
        };
        let (recorder, bytes) = (self.recorder.clone(), size_of_val(&output[..]) as u64);
        post.receive(from, tag, |at| {
            let (resolve, pending) = Pending::new(CollectiveError::Closed { at });
            recorder.begin(at.op, bytes);
            let given = Box::new(move |outcome| {
                recorder.end(at.op, &outcome);
                // Who dropped its `Pending` does not want to know.
                let _ = resolve.send(outcome);
            });
            (Box::new(Into { output, given }), pending)
        })
        .unwrap_or_else(|at| Pending::failed(too_many(at)))
    }

    fn post_for(&self, peer: Rank) -> Result<&Post, CollectiveError> {
        let rank = self.ring().rank();
        let invalid = |reason: String| CollectiveError::InvalidInput { rank, reason };
        if peer == rank || peer.0 >= self.ring().world_size().get() {
            return Err(invalid(format!("rank {peer} is not another rank of this group: no messages there")));
        }
        let posted = self.posted.as_ref();
        let posted = posted.ok_or_else(|| invalid("this group was made without ways for messages".into()))?;
        Ok(&posted.post)
    }
}
