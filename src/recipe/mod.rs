//! Recipes: what the user wrote becomes one checked [`Plan`].
//!
//! ```text
//! base.toml < recipe.toml < --set     layers, each value with its Origin
//!        |
//!      one tree ── unknown keys, types, ranges, contradictions ──> Plan
//!        |
//!      Resolved::text                 every default filled in; saved with the run, sent to workers
//! ```
//!
//! # Invariants
//! 1. Nothing is silently ignored: a key that nobody reads is an error that names the nearest one and the
//!    line.
//! 2. The resolved text parses back to the same plan, anywhere: it extends nothing and its paths are
//!    absolute.
//! 3. No text makes parsing panic.
//!
//! Deliberately absent: the number of workers (scheduling, not part of a result), and any knowledge of what
//! `[model]` and
//! `[data]` hold: those tables belong to the task. Only `model.family`, which selects the task, is read
//! here, and the paths `data.text`, `data.tokenizer.file` and `model.init` are made absolute.

mod error;
mod keys;
mod layers;
mod origin;
mod plan;
mod render;
mod task_table;
#[cfg(test)]
mod tests;
mod tree;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::path::Path;

use mattock_worker::plan::Plan;
use toml::Value;

pub use error::RecipeError;
pub use origin::Origin;

use task_table::Leaf;
use tree::Table;

/// A recipe with nothing left open.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// As TOML, with each value's origin as a comment; parses back to the same plan.
    pub text: String,
    /// The same, checked.
    pub plan: Plan,
    /// Each value's origin, by the dotted path of its key.
    pub origins: BTreeMap<String, Origin>,
    /// Each value as it was written, by the dotted path of its key.
    values: BTreeMap<String, Value>,
}

/// A key on which two recipes differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Its dotted path.
    pub key: String,
    /// Its value in the older one.
    pub was: String,
    /// Its value in the newer one.
    pub is: String,
    /// Where the newer one says so.
    pub origin: String,
}

impl Resolved {
    /// Reads the recipe at `path` with the recipes it extends, and lays `sets` (`key=value`) over it.
    ///
    /// # Errors
    /// Whatever is wrong first, with file, line, key and a way on.
    pub fn load(path: &Path, sets: &[String]) -> Result<Self, RecipeError> {
        Self::resolve(layers::load(path, sets)?, path)
    }

    /// Parses a resolved recipe, such as one that came over the wire; `name` is what errors call it.
    ///
    /// # Errors
    /// As [`Resolved::load`]. A recipe that extends another is refused: this one stands alone.
    pub fn parse(text: &str, name: &Path) -> Result<Self, RecipeError> {
        Self::resolve(Table::parse(text, name)?, name)
    }

    /// Which task trains: the value of `model.family`.
    pub fn family(&self) -> &str {
        self.values.get("model.family").and_then(Value::as_str).unwrap_or_default()
    }

    /// Where this recipe says otherwise than `saved`, key by key.
    pub fn changes_since(&self, saved: &Self) -> Vec<Change> {
        let keys: BTreeSet<&String> = self.values.keys().chain(saved.values.keys()).collect();
        let said = |value: Option<&Value>| value.map_or_else(|| "absent".to_owned(), Value::to_string);
        let differs = |key: &&String| self.values.get(*key) != saved.values.get(*key);
        keys.into_iter()
            .filter(differs)
            .map(|key| Change {
                key: key.clone(),
                was: said(saved.values.get(key)),
                is: said(self.values.get(key)),
                origin: self.origins.get(key).unwrap_or(&Origin::Default).to_string(),
            })
            .collect()
    }

    /// Brings home what a task said about its table: `path` is `model` or `data`, or a table below if that
    /// is known;
    /// `error` is what serde said when reading it with `deny_unknown_fields`.
    pub fn table_error(&self, path: &str, error: &impl Display) -> RecipeError {
        let prefix = format!("{path}.");
        let leaves: Vec<Leaf<'_>> = self
            .values
            .iter()
            .filter(|(key, _)| key.starts_with(&prefix) || *key == path)
            .filter_map(|(key, value)| Some(Leaf { path: key, value, origin: self.origins.get(key)? }))
            .collect();
        task_table::explain(path, &error.to_string(), &leaves)
    }

    fn resolve(mut tree: Table, path: &Path) -> Result<Self, RecipeError> {
        let plan = plan::check(&mut tree, path)?;
        let leaves = tree.leaves();
        Ok(Self {
            text: render::render(&tree),
            plan,
            origins: leaves.iter().map(|(key, node)| (key.clone(), node.origin().clone())).collect(),
            values: leaves.iter().map(|(key, node)| (key.clone(), node.to_value())).collect(),
        })
    }
}
