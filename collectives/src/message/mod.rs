//! Messages from one rank to another, beside what all ranks do together: sent and received by tag, over links of their own.
//!
//! A link between two ranks is made when one of them first has something for the other. What all ranks do together travels
//! elsewhere, so neither waits for the other; but a group has one end, which is that of its messages, too.
//!
//! Between ranks of one host only words travel; a message itself is read where it lies.

pub(crate) mod letters;
pub(crate) mod mailbox;
pub(crate) mod neighbours;
mod peer;
pub(crate) mod post;
pub(crate) mod roads;
