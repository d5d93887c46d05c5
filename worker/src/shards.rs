//! Published datasets in object storage: what the data crate asks of a store, done by the checkpoints' client.

use std::ops::ControlFlow;
use std::sync::Arc;

use mattock_checkpoint::{Location, Objects, StoreError};
use mattock_data::{ShardStore, StoreFault};

/// A place in object storage.
struct Place(Objects);

/// Opens the place of a published dataset for reading: a folder, `file://` or `s3://`.
///
/// # Errors
/// Where it is no place, or cannot be opened.
pub fn open(url: &str) -> Result<Arc<dyn ShardStore>, StoreFault> {
    Ok(Arc::new(Place(Objects::open(&parse(url)?).map_err(fault)?)))
}

/// Opens a place to publish to.
///
/// # Errors
/// Where it is no place, or cannot be made.
pub fn create(url: &str) -> Result<Arc<dyn ShardStore>, StoreFault> {
    Ok(Arc::new(Place(Objects::create(&parse(url)?).map_err(fault)?)))
}

fn parse(url: &str) -> Result<Location, StoreFault> {
    let place = Location::parse(url);
    place.map_err(|error| StoreFault {
        text: error.to_string().replace("a place for checkpoints", "a place for a dataset"),
        missing: false,
        again: false,
    })
}

fn fault(error: StoreError) -> StoreFault {
    StoreFault { text: error.to_string(), missing: error.is_missing(), again: error.is_transient() }
}

impl ShardStore for Place {
    fn read(&self, name: &str, take: &mut dyn FnMut(&[u8]) -> ControlFlow<()>) -> Result<(), StoreFault> {
        self.0.read(name, take).map_err(fault)
    }

    fn size(&self, name: &str) -> Result<Option<u64>, StoreFault> {
        self.0.size(name).map_err(fault)
    }

    fn put(&self, name: &str, bytes: Vec<u8>) -> Result<(), StoreFault> {
        self.0.put(name, bytes.into()).map_err(fault)
    }

    fn create(&self, name: &str, bytes: Vec<u8>) -> Result<bool, StoreFault> {
        self.0.create_only(name, bytes.into()).map(|theirs| theirs.is_none()).map_err(fault)
    }

    fn url(&self, name: &str) -> String {
        self.0.url(name)
    }
}
