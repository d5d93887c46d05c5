//! Ctrl-C and SIGTERM: what was started ends, and hosts are taken down, before the program does.

use std::fmt;
use std::io;
use std::sync::mpsc::Receiver;

/// Whether the user wants to stop.
#[derive(Debug)]
pub struct Stop {
    reasons: Receiver<String>,
}

/// He does.
#[derive(Debug)]
pub struct Stopped(String);

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stopped: {}", self.0)
    }
}

impl std::error::Error for Stopped {}

impl Stop {
    /// Signals that come from here on are told as these reasons.
    pub fn on(reasons: Receiver<String>) -> Self {
        Self { reasons }
    }

    /// Goes on, unless the user wants to stop.
    ///
    /// # Errors
    /// [`Stopped`], where he does.
    pub fn check(&self) -> io::Result<()> {
        match self.reasons.try_recv() {
            Ok(reason) => Err(io::Error::other(Stopped(reason))),
            // Without anybody to tell it, nobody wants to.
            Err(_) => Ok(()),
        }
    }

    /// Whether that is why something failed.
    pub fn is(error: &io::Error) -> bool {
        error.get_ref().is_some_and(|inner| inner.is::<Stopped>())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_stop_is_told_from_a_failure() {
        let (tell, reasons) = channel();
        let stop = Stop::on(reasons);
        assert!(stop.check().is_ok());
        tell.send("it received SIGINT".to_owned()).unwrap();
        let stopped = stop.check().unwrap_err();
        assert!(Stop::is(&stopped), "{stopped}");
        assert_eq!(stopped.to_string(), "stopped: it received SIGINT");
        drop(tell);
        assert!(stop.check().is_ok() && !Stop::is(&io::Error::other("a failure")));
    }
}
