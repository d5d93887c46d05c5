//! How long a launcher waits for what: all of it derived from the recipe's one `timeout`.

use std::time::Duration;

/// Timeouts that a coordinator may say nothing, asked or not; workers look for another after one of them, and wait for this one
/// longer than that.
const SILENCE: u32 = 2;
/// And at least so long: a busy machine is no dead coordinator.
const SILENCE_MIN: Duration = Duration::from_secs(2);

/// How long each ending is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    /// From the coordinator's start until it listens.
    pub start: Duration,
    /// From then until training begins, where workers of other machines are waited for.
    pub gather: Option<Duration>,
    /// From the request to stop until the coordinator has ended; holds a whole step and a checkpoint.
    pub stop: Duration,
    /// How long a coordinator that has been asked whether it lives may say nothing.
    pub silence: Duration,
    /// From the end of one side (the coordinator, or the last worker) until the other has ended too.
    pub exit: Duration,
}

impl Deadlines {
    /// All derived from the recipe's one `timeout`.
    pub fn new(elastic_timeout: Duration) -> Self {
        Self {
            start: 3 * elastic_timeout,
            gather: None,
            stop: 60 * elastic_timeout,
            silence: (SILENCE * elastic_timeout).max(SILENCE_MIN),
            exit: 3 * elastic_timeout,
        }
    }

    /// For a run that has workers on other machines too, which are waited for so long.
    #[must_use]
    pub fn with_others(self, gather: Duration) -> Self {
        Self { gather: Some(gather), ..self }
    }
}
