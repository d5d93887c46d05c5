//! Checkpoints in object storage: standard safetensors files, the manifest last, verified on load.
//!
//! ```text
//! probe -> claim -> Writer::submit .. submit -> finish          (a run: one writer, or one for each share)
//!          claim -> load(Newest), load_ranges                   (resuming it, on any number of workers)
//! list, show, verify, load_weights                              (looking at it, using it)
//! Foreign                                                       (weights that another program wrote)
//! Objects                                                       (whatever else lies in a location)
//! ```
//!
//! Functions block and may be called from anywhere; what is asynchronous stays inside. The [`Writer`] has a thread of
//! its own. What lies where is told in [`format`](mod@format).
//!
//! # Invariants
//! 1. A checkpoint exists from the moment its manifest does, which is created last; nothing half is taken for whole.
//! 2. Whatever fails or is killed, complete checkpoints stay as they are.
//! 3. Whatever is loaded was checked by a hash; a flaw is named, and the checkpoint before it used instead.
//!
//! Deliberately absent: Burn, recipes, ranks. Checkpoints are logical tensors of one flat space, in one share or several; who
//! writes which is the caller's business, and the store is what writers have in common.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, of which one is the common case")]

mod blocking;
mod buffers;
mod claim;
mod flaw;
mod folder;
mod foreign;
pub mod format;
mod gc;
mod layout;
mod listing;
mod location;
mod objects;
mod probe;
mod read;
mod reader;
mod records;
mod retention;
mod reuse;
pub mod room;
mod s3;
mod save;
mod share;
mod shares;
mod slices;
mod snapshot;
mod store;
mod store_error;
mod stretch;
mod upload;
mod uploads;
mod verify;
mod writer;

pub use claim::{ClaimError, How, claim, holder_of};
pub use flaw::{Flaw, Unusable};
pub use foreign::{Foreign, ForeignError};
pub use format::manifest::{Chunks, Manifest, ManifestError, PieceInfo};
#[doc(hidden)]
pub use format::safetensors::header_of;
pub use gc::{Garbage, gc};
pub use layout::{Layout, LayoutError, TensorMeta};
pub use listing::{Listing, Summary, list};
pub use location::{Location, LocationError};
pub use objects::Objects;
pub use probe::{Examination, ProbeError, examine, probe};
pub use reader::{Head, LoadError, Loaded, Weights, Which, load, load_ranges, load_weights, show};
pub use records::{RECORD_BYTES_MAX, RecordError, Records};
pub use retention::Retention;
pub use save::{SaveError, Stop};
pub use share::Share;
pub use slices::{Slices, SlicesError};
pub use snapshot::{Files, RunFacts, Snapshot, SnapshotError};
pub use store_error::{Reason, StoreError};
pub use upload::Tuning;
pub use verify::{Verdict, verify};
pub use writer::{FinishError, Outcome, Saved, Writer};
