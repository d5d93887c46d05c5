//! An operation on its way from the caller to whoever runs it: the ring's driver, the host's engine, or this thread.

use std::sync::Arc;

use super::{Group, PENDING_MAX, Way};
use crate::buffer::Buffer;
use crate::collective::{Collective, OpId};
use crate::driver::Shared;
use crate::error::{CollectiveError, Payload, Place};
use crate::pending::Pending;
use crate::recorder::Recorder;
use crate::reduction::{Element, Fold, Reduction, ReductionKind, combine_into};
use crate::ring::Ring;
use crate::schedule::Parts;
use crate::schedule::ring::Schedule;
use crate::shm::board::INLINE_BYTES;
use crate::shm::calls::Call;
use crate::shm::engine::{Engine, Job, Turn};
use crate::transfer::{Buffers, Kernel, Resolve, TypedTransfer};

/// How elements are combined, in the two ways of running an operation.
#[derive(Clone, Copy)]
pub(super) struct Combine<E> {
    kind: ReductionKind,
    kernel: Kernel<E>,
    fold: Fold,
}

impl<E: Element> Combine<E> {
    pub(super) fn by<R: Reduction<Element = E>>() -> Self {
        Self { kind: R::KIND, kernel: combine_into::<R>, fold: Fold::of::<R>() }
    }

    /// For links.
    pub(super) fn kernel(&self) -> (ReductionKind, Kernel<E>) {
        (self.kind, self.kernel)
    }

    /// For some of the ranks, where others are added later.
    pub(super) fn partial(&self) -> Fold {
        Fold { is_partial: true, ..self.fold }
    }
}

/// An operation to be run.
pub(super) struct Order<E> {
    pub(super) collective: Collective,
    /// How the whole payload is divided.
    pub(super) parts: Parts,
    pub(super) reduction: Option<Combine<E>>,
    pub(super) buffers: Buffers<E>,
}

impl<E: Element> Order<E> {
    /// Of the whole payload.
    pub(super) fn bytes(&self) -> u64 {
        (self.parts.len() * size_of::<E>()) as u64
    }

    pub(super) fn payload(&self) -> Payload {
        let reduction = self.reduction.map(|combine| combine.kind);
        Payload { element: E::KIND, reduction, total_bytes: self.bytes() }
    }

    /// As the ring's driver runs it.
    fn transfer(self, ring: Ring, chunk_bytes: u32, resolve: Resolve<E>) -> TypedTransfer<E> {
        let schedule =
            Schedule::new(ring, self.collective, self.parts, chunk_bytes as usize / size_of::<E>());
        let reduction = self.reduction.map(|combine| combine.kernel());
        TypedTransfer::new(schedule, reduction, self.buffers, resolve)
    }

    /// Over the memory of this host.
    fn run(self, engine: &Engine, turn: &mut Turn, op: OpId) -> Result<Buffer<E>, CollectiveError> {
        let payload = self.payload();
        let Buffers { input, mut output, .. } = self.buffers;
        engine.run(
            turn,
            Call {
                op,
                part_of: None,
                payload,
                parts: self.parts,
                fold: self.reduction.map(|combine| combine.fold),
                input: input.as_deref().map(|input| bytemuck::cast_slice(&input[..])),
                input_at: engine.offset_of(input.as_deref().unwrap_or(&output)),
                output_at: engine.offset_of(&output),
                output: bytemuck::cast_slice_mut(&mut output[..]),
            },
        )?;
        Ok(output)
    }
}

impl Group {
    /// Runs an operation now, and waits for it.
    pub(super) fn run<E: Element>(&self, order: Order<E>) -> Result<Buffer<E>, CollectiveError> {
        let Way::Host { engine, .. } = &self.way else {
            return self.submit(order, |output| output).wait();
        };
        let (collective, bytes) = (order.collective, order.bytes());
        let mut order = Some(order);
        let outcome = engine.run_now(collective, |engine, turn, op| {
            let order = order.take()?;
            if bytes <= INLINE_BYTES as u64 {
                let outcome = order.run(engine, turn, op);
                self.recorder.begin_and_end(op, bytes, &outcome);
                return Some(outcome);
            }
            self.recorder.begin(op, bytes);
            let outcome = order.run(engine, turn, op);
            self.recorder.end(op, &outcome);
            Some(outcome)
        });
        match (outcome.flatten(), order) {
            (None, Some(order)) => self.submit(order, |output| output).wait(),
            (outcome, _) => outcome.expect("an order that was taken was run"),
        }
    }

    /// Queues an operation; `finish` makes its result of the output.
    pub(super) fn submit<E: Element, T: Send + 'static>(
        &self,
        order: Order<E>,
        finish: impl FnOnce(Buffer<E>) -> T + Send + 'static,
    ) -> Pending<T> {
        let (recorder, bytes) = (self.recorder.clone(), order.bytes());
        match &self.way {
            Way::Ring { links, shortcut: Some(shortcut) } if shortcut.carries(order.collective) => {
                shortcut.submit(&links.shared, order, recorder, finish)
            }
            Way::Ring { links, .. } => {
                let collective = order.collective;
                let transfer = |resolve| order.transfer(self.ring, links.chunk_bytes, resolve);
                submit_to_ring(&links.shared, (collective, bytes), recorder, transfer, finish)
            }
            Way::Host { engine, .. } => {
                let queued = engine.submit(order.collective, PENDING_MAX, |at| {
                    let (resolve, pending) = Pending::new(CollectiveError::Closed { at });
                    recorder.begin(at.op, bytes);
                    let job: Job = Box::new(move |engine, turn| {
                        let outcome = order.run(engine, turn, at.op);
                        recorder.end(at.op, &outcome);
                        // Who dropped its `Pending` does not want to know.
                        Box::new(move || drop(resolve.send(outcome.map(finish))))
                    });
                    (job, pending)
                });
                queued.unwrap_or_else(|at| Pending::failed(too_many(at)))
            }
        }
    }
}

pub(crate) fn too_many(at: Place) -> CollectiveError {
    let reason = format!("{PENDING_MAX} operations are pending: wait for one of them first");
    CollectiveError::InvalidInput { rank: at.rank, reason }
}

fn submit_to_ring<E: Element, T: Send + 'static>(
    shared: &Shared,
    (collective, bytes): (Collective, u64),
    recorder: Arc<Recorder>,
    transfer: impl FnOnce(Resolve<E>) -> TypedTransfer<E>,
    finish: impl FnOnce(Buffer<E>) -> T + Send + 'static,
) -> Pending<T> {
    shared.update(|exchange| {
        let at = exchange.next_place(collective);
        let (resolve, pending) = Pending::new(CollectiveError::Closed { at });
        if exchange.pending() >= PENDING_MAX {
            let _ = resolve.send(Err(too_many(at)));
            return pending;
        }
        recorder.begin(at.op, bytes);
        exchange.submit(Box::new(transfer(Box::new(move |outcome| {
            recorder.end(at.op, &outcome);
            // Who dropped its `Pending` does not want to know.
            let _ = resolve.send(outcome.map(finish));
        }))));
        pending
    })
}
