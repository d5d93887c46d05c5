//! Errors of a store that a person can act on: what was being done, to what, why it failed, what to do.
//!
//! `object_store` tells the cause in a chain of wrapped errors; here it is found, put into one line, and sorted by
//! what it means for the next step.

use std::fmt;

use object_store::Error;
use object_store::client::{HttpError, HttpErrorKind};

/// A store did not do what it was asked: what, where, why, and what to do.
#[derive(Debug, thiserror::Error)]
#[error("could not {operation} {url}: {why}{}", advice(.reason, .url))]
pub struct StoreError {
    /// What was being done, as a verb.
    pub operation: &'static str,
    /// To what.
    pub url: String,
    /// The kind of the cause.
    pub reason: Reason,
    /// The cause in the store's own words.
    pub why: String,
    /// The store's error.
    pub source: Box<Error>,
}

/// Kinds of causes, as far as they make a difference to what is done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// There is no such object, folder or bucket.
    Missing,
    /// Credentials are wrong, or allow too little.
    Denied,
    /// The disk or quota is full.
    Full,
    /// Nobody answers.
    Unreachable,
    /// The store does not have the operation, or not under that name.
    Unsupported,
    /// The store holds the request for wrong.
    Refused,
    /// Anything else: worth another try.
    Other,
}

impl StoreError {
    pub(crate) fn new(operation: &'static str, url: &str, source: Error) -> StoreError {
        let (reason, why) = (Reason::of(&source), cause(&source));
        StoreError { operation, url: url.to_owned(), reason, why, source: Box::new(source) }
    }

    /// There is no such object.
    pub fn is_missing(&self) -> bool {
        self.reason == Reason::Missing
    }

    /// Whether another try may go better.
    pub fn is_transient(&self) -> bool {
        matches!(self.reason, Reason::Unreachable | Reason::Other)
    }
}

impl Reason {
    fn of(error: &Error) -> Reason {
        match error {
            Error::NotFound { .. } => Reason::Missing,
            Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => Reason::Denied,
            Error::NotSupported { .. } | Error::NotImplemented { .. } | Error::InvalidPath { .. } => {
                Reason::Unsupported
            }
            _ => causes(error).find_map(Reason::of_cause).unwrap_or(Reason::Other),
        }
    }

    fn of_cause(cause: &(dyn std::error::Error + 'static)) -> Option<Reason> {
        use std::io::ErrorKind;
        if let Some(http) = cause.downcast_ref::<HttpError>() {
            return matches!(http.kind(), HttpErrorKind::Connect | HttpErrorKind::Timeout)
                .then_some(Reason::Unreachable);
        }
        let Some(io) = cause.downcast_ref::<std::io::Error>() else {
            return Reason::of_answer(&cause.to_string());
        };
        match io.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory => Some(Reason::Missing),
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => Some(Reason::Denied),
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Some(Reason::Full),
            ErrorKind::ConnectionRefused | ErrorKind::TimedOut | ErrorKind::HostUnreachable => {
                Some(Reason::Unreachable)
            }
            _ => None,
        }
    }
}

impl Reason {
    /// Of an HTTP answer's status, which `object_store` tells in words only.
    fn of_answer(text: &str) -> Option<Reason> {
        let (_, rest) = text.split_once("status code: ")?;
        let status: u16 = rest.get(..3)?.parse().ok()?;
        let worth_repeating = [408, 425, 429].contains(&status);
        ((400..500).contains(&status) && !worth_repeating).then_some(Reason::Refused)
    }
}

/// An error and what it came from.
fn causes<'a>(error: &'a Error) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    std::iter::successors(Some(error as &(dyn std::error::Error + 'static)), |error| error.source())
}

/// The root cause in one line; of an S3 server's XML only code and message.
fn cause(error: &Error) -> String {
    let root = causes(error).last().map(ToString::to_string).unwrap_or_default();
    let tag = |name: &str| {
        let (_, rest) = root.split_once(&format!("<{name}>"))?;
        Some(rest.split_once('<')?.0.to_owned())
    };
    match (tag("Code"), tag("Message")) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        (Some(code), None) => code,
        _ => root.split_whitespace().collect::<Vec<_>>().join(" "),
    }
}

/// What to do about it.
fn advice(reason: &Reason, url: &str) -> impl fmt::Display {
    let s3 = url.starts_with("s3://");
    match reason {
        Reason::Missing if s3 => "; check the bucket's name and AWS_ENDPOINT, and create the bucket",
        Reason::Missing => "; check the path",
        Reason::Denied if s3 => {
            "; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and the bucket's policy"
        }
        Reason::Denied => "; check who owns the folder and whether it may be written",
        Reason::Full => "; free some space, or keep fewer checkpoints",
        Reason::Unreachable if s3 => {
            "; check AWS_ENDPOINT, the network and, if no keys are set, the instance's role"
        }
        Reason::Unreachable => "; check the network",
        Reason::Unsupported | Reason::Refused | Reason::Other => "",
    }
}
