//! What a launcher tells workers beyond the recipe: opaque to the coordinator, which passes it on.

use serde::{Deserialize, Serialize};

/// What a launcher tells workers beyond the recipe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Where checkpoints are written and read.
    pub checkpoints: String,
    /// From where to start.
    pub start: Start,
}

/// From where to start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// From the initial parameters.
    Fresh,
    /// From the newest checkpoint that is whole.
    Newest,
    /// From the newest checkpoint that is whole, or, where there is none at all, from the initial parameters.
    NewestIfAny,
    /// From that of a step.
    Step(u64),
}
