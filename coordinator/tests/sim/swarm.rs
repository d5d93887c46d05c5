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
/// No message is longer under way, unless a fault stalls its connection.
pub(crate) const DELAY_MAX: Duration = Duration::from_millis(300);

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
    /// The link between two ranks breaks; both live.
    CutRing,
    /// A worker that joined joins again, from elsewhere.
    JoinAgain,
    /// A worker too many, at any time.
    Surplus,
    /// A worker of another binary or device.
    Stranger,
    /// The user wants to stop.
    Stop,
    /// A worker fails, for the user's input or for another reason.
    Fail,
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
}

impl Kind {
    /// All kinds.
    pub(crate) const ALL: [Self; 17] = [
        Self::Kill,
        Self::Pause,
        Self::Silence,
        Self::Freeze,
        Self::Disconnect,
        Self::Stall,
        Self::CutRing,
        Self::JoinAgain,
        Self::Surplus,
        Self::Stranger,
        Self::Stop,
        Self::Fail,
        Self::Flip,
        Self::OtherStep,
        Self::Abandon,
        Self::Babble,
        Self::Repeat,
    ];
    /// Those that a run survives without a scratch.
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
