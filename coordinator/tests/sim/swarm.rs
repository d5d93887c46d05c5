//! What a seed may vary.
//!
//! Each seed draws not only when faults happen but which kinds may happen at all ("swarm testing", Groce et al., 2012):
//! a run in which everything goes wrong hides what a run with one kind of fault shows.

use std::ops::RangeInclusive;
use std::time::Duration;

/// The one knob for time, in all simulated runs.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(10);
/// Heartbeats within a timeout, as the client sends them.
pub(crate) const HEARTBEATS: u32 = 8;
/// No message is longer under way, unless a fault stalls its connection: who is called lost can answer in time.
pub(crate) const DELAY_MAX: Duration = Duration::from_millis(200);

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// A worker's process dies.
    Kill,
    /// A worker does nothing for a while, well below the timeout.
    Pause,
    /// A worker does nothing for longer than the timeout.
    Silence,
    /// A worker's host is gone for good, without a word.
    Freeze,
    /// A worker's control connection breaks; the worker lives.
    Disconnect,
    /// A worker's messages, in both directions, are held up for a while.
    Stall,
    /// Those that it sends.
    StallUp,
    /// Those that it is sent.
    StallDown,
    /// The link between two ranks breaks once; both live.
    CutRing,
    /// The same, and only one of them notices.
    CutRingOneWay,
    /// The line between two workers carries no ring until faults stop; both reach the coordinator.
    Partition,
    /// A worker cannot bring up its links.
    NoLink,
    /// A worker computes for longer than the timeout; it is alive all the while.
    Slow,
    /// A worker's listening thread hangs; it says that it is alive all the while.
    Deafen,
    /// A worker is told to leave.
    Leave,
    /// The user wants another number of workers.
    Scale,
    /// A worker that joined joins again, from elsewhere.
    JoinAgain,
    /// A worker more, at any time.
    Surplus,
    /// A worker of another binary or device.
    Stranger,
    /// The user wants to stop.
    Stop,
    /// A worker fails, and the run with it: for the user's input or for another reason.
    Fail,
    /// A worker fails, and knows that it is alone in that.
    Ill,
    /// A worker's state is not what it should be: one bit of its memory flipped.
    Flip,
    /// A worker loaded another checkpoint than the rest.
    OtherStep,
    /// A process ends before it becomes a worker.
    Abandon,
    /// A worker sends what makes no sense now.
    Babble,
    /// A worker reports steps again that it has reported.
    Repeat,
    /// The coordinator's process dies, and another takes over.
    CoordinatorDies,
    /// Another coordinator takes over while the one before it lives, and does not know.
    Usurp,
}

impl Kind {
    /// All kinds.
    pub(crate) const ALL: [Self; 29] = [
        Self::Kill,
        Self::Pause,
        Self::Silence,
        Self::Freeze,
        Self::Disconnect,
        Self::Stall,
        Self::StallUp,
        Self::StallDown,
        Self::CutRing,
        Self::CutRingOneWay,
        Self::Partition,
        Self::NoLink,
        Self::Slow,
        Self::Deafen,
        Self::Leave,
        Self::Scale,
        Self::JoinAgain,
        Self::Surplus,
        Self::Stranger,
        Self::Stop,
        Self::Fail,
        Self::Ill,
        Self::Flip,
        Self::OtherStep,
        Self::Abandon,
        Self::Babble,
        Self::Repeat,
        Self::CoordinatorDies,
        Self::Usurp,
    ];
    /// Those that happen to workers and coordinators: whatever they do, the run completes.
    pub(crate) const SURVIVED: [Self; 21] = [
        Self::Kill,
        Self::Pause,
        Self::Silence,
        Self::Freeze,
        Self::Disconnect,
        Self::Stall,
        Self::StallUp,
        Self::StallDown,
        Self::CutRing,
        Self::CutRingOneWay,
        Self::Partition,
        Self::NoLink,
        Self::Slow,
        Self::Deafen,
        Self::Ill,
        Self::JoinAgain,
        Self::Surplus,
        Self::Babble,
        Self::Repeat,
        Self::CoordinatorDies,
        Self::Usurp,
    ];
    /// Those that a run does not even notice.
    pub(crate) const HARMLESS: [Self; 5] =
        [Self::Pause, Self::JoinAgain, Self::Babble, Self::Repeat, Self::Stall];
}

/// The runs that a scenario draws from.
#[derive(Debug, Clone)]
pub(crate) struct Swarm {
    /// Workers that the run waits for.
    pub(crate) workers: RangeInclusive<u64>,
    /// M.
    pub(crate) micro_batches: RangeInclusive<u64>,
    /// Steps of the whole run.
    pub(crate) steps: RangeInclusive<u64>,
    /// How long a message is under way.
    pub(crate) delay: RangeInclusive<Duration>,
    /// How long a stalled connection holds messages up.
    pub(crate) stall: RangeInclusive<Duration>,
    /// Kinds of fault that may happen; a seed takes some of them.
    pub(crate) kinds: Vec<Kind>,
    /// Faults of a run.
    pub(crate) faults: RangeInclusive<u64>,
    /// When they happen, counted from the start.
    pub(crate) fault_times: RangeInclusive<Duration>,
}

const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

impl Swarm {
    /// Nothing goes wrong; messages take their time.
    pub(crate) fn calm() -> Self {
        Self {
            workers: 1..=8,
            micro_batches: 1..=24,
            steps: 1..=8,
            delay: ms(0)..=DELAY_MAX,
            stall: ms(10)..=ms(2 * TIMEOUT.as_millis() as u64),
            kinds: Vec::new(),
            faults: 0..=0,
            fault_times: ms(0)..=ms(4_000),
        }
    }

    /// Anything goes wrong with workers, at any time.
    pub(crate) fn deadly() -> Self {
        Self { kinds: Kind::SURVIVED.to_vec(), faults: 1..=6, ..Self::calm() }
    }

    /// Anything goes wrong, at any time.
    pub(crate) fn lossy() -> Self {
        Self { kinds: Kind::ALL.to_vec(), faults: 1..=4, ..Self::calm() }
    }

    /// What a run must bear.
    pub(crate) fn bearable() -> Self {
        let stall = ms(10)..=TIMEOUT / 5;
        Self { kinds: Kind::HARMLESS.to_vec(), faults: 1..=4, stall, ..Self::calm() }
    }
}
