//! Leases beside a run's checkpoints: where a coordinator's lease is kept, and where a worker looks for the next one.

use std::sync::Arc;

use mattock_checkpoint::{Location, RecordError, Records};
use mattock_coordinator::lease::{LeaseError, LeaseStore};

/// The folder of leases, in the location of the checkpoints.
const FOLDER: &str = "lease";

/// Leases in object storage.
#[derive(Debug)]
struct Stored(Records);

/// The leases of the run whose checkpoints are kept at this address.
///
/// # Errors
/// Where that is no address.
pub fn beside(checkpoints: &str) -> Result<Arc<dyn LeaseStore>, mattock_checkpoint::LocationError> {
    Ok(Arc::new(Stored(Records::new(Location::parse(checkpoints)?, FOLDER))))
}

/// Whether leases can be kept there: writes something.
///
/// # Errors
/// Why not.
pub fn probe(checkpoints: &str) -> Result<(), String> {
    let location = Location::parse(checkpoints).map_err(|error| error.to_string())?;
    Records::new(location, FOLDER).probe().map_err(|error| error.to_string())
}

fn failed(error: RecordError) -> LeaseError {
    LeaseError::Store(error.to_string())
}

impl LeaseStore for Stored {
    fn newest(&self, after: u64) -> Result<Option<(u64, Vec<u8>)>, LeaseError> {
        self.0.newest(after).map_err(failed)
    }

    fn read(&self, number: u64) -> Result<Option<Vec<u8>>, LeaseError> {
        self.0.read(number).map_err(failed)
    }

    fn create(&self, number: u64, record: &[u8]) -> Result<bool, LeaseError> {
        self.0.create(number, record).map_err(failed)
    }
}
