//! Where published datasets lie, as far as this crate needs to know: named objects, read as a stream.
//!
//! Deliberately absent: any store. Whoever has a client implements the trait; this crate stays free of networks.

use std::ops::ControlFlow;

/// Named objects below some address. Calls block; each ends within some minutes, whatever happens.
pub trait ShardStore: Send + Sync {
    /// Hands an object's bytes to `take`, in order, until it breaks off; that is no fault.
    ///
    /// # Errors
    /// Where the store fails; what was handed out before is then worth nothing.
    fn read(&self, name: &str, take: &mut dyn FnMut(&[u8]) -> ControlFlow<()>) -> Result<(), StoreFault>;

    /// Size of an object; `None` where there is none.
    ///
    /// # Errors
    /// Where the store fails.
    fn size(&self, name: &str) -> Result<Option<u64>, StoreFault>;

    /// Writes an object.
    ///
    /// # Errors
    /// Where the store fails.
    fn put(&self, name: &str, bytes: Vec<u8>) -> Result<(), StoreFault>;

    /// Writes an object unless there is one; `false` where there is one with other bytes.
    ///
    /// # Errors
    /// Where the store fails.
    fn create(&self, name: &str, bytes: Vec<u8>) -> Result<bool, StoreFault>;

    /// Address of an object, for messages.
    fn url(&self, name: &str) -> String;
}

/// A store did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct StoreFault {
    /// What was being done, to what, why it failed, what to do.
    pub text: String,
    /// Whether there is no such object.
    pub missing: bool,
    /// Whether another try may go better.
    pub again: bool,
}
