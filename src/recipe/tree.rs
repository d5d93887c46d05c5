//! A recipe as written: a tree of TOML values, each with its origin.
//!
//! Layers (a base recipe, the recipe, `--set`) are laid over each other before anything is read. A table
//! merges key by key; a value replaces; and so does a table written inline, because `tokenizer = { kind =
//! "bytes" }` means to say all there is, and not to inherit a `vocab` from somebody else's BPE.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use toml::Value;
use toml::de::{DeArray, DeTable, DeValue};

use super::{Origin, RecipeError};

/// A value or a table of values.
#[derive(Debug, Clone)]
pub(super) enum Node {
    /// A scalar, or an array as a whole.
    Value(Value, Origin),
    /// A table, inline or not.
    Table(Table),
}

impl Node {
    /// Where it was written.
    pub(super) fn origin(&self) -> &Origin {
        match self {
            Self::Value(_, origin) => origin,
            Self::Table(table) => &table.origin,
        }
    }

    /// As a plain TOML value, without origins.
    pub(super) fn to_value(&self) -> Value {
        match self {
            Self::Value(value, _) => value.clone(),
            Self::Table(table) => {
                Value::Table(table.entries.iter().map(|(key, node)| (key.clone(), node.to_value())).collect())
            }
        }
    }
}

/// Keys and what they hold.
#[derive(Debug, Clone)]
pub(super) struct Table {
    /// Children by name.
    pub(super) entries: BTreeMap<String, Node>,
    /// The header's line, or that of the first key.
    pub(super) origin: Origin,
    /// Written inline: it replaces what lies below rather than merging with it.
    inline: bool,
}

impl Table {
    /// An empty table.
    pub(super) fn new(origin: Origin) -> Self {
        Self { entries: BTreeMap::new(), origin, inline: false }
    }

    /// Parses a TOML document; `path` is what origins and errors call it.
    pub(super) fn parse(text: &str, path: &Path) -> Result<Self, RecipeError> {
        let source = Source { text, path: path.into() };
        let document = DeTable::parse(text).map_err(|error| RecipeError::Syntax {
            origin: source.origin(error.span().map_or(0, |span| span.start)),
            message: error.message().to_owned(),
        })?;
        source.table(document.get_ref(), "", source.origin(0), false)
    }

    /// Lays `over` on top of this one.
    pub(super) fn overlay(&mut self, over: Self) {
        for (key, node) in over.entries {
            match (self.entries.get_mut(&key), node) {
                (Some(Node::Table(below)), Node::Table(above)) if !above.inline => below.overlay(above),
                (_, node) => {
                    self.entries.insert(key, node);
                }
            }
        }
    }

    /// The node at a dotted path.
    pub(super) fn get(&self, path: &str) -> Option<&Node> {
        match path.split_once('.') {
            None => self.entries.get(path),
            Some((head, rest)) => match self.entries.get(head)? {
                Node::Table(table) => table.get(rest),
                Node::Value(..) => None,
            },
        }
    }

    /// The node at a dotted path, to change it.
    pub(super) fn get_mut(&mut self, path: &str) -> Option<&mut Node> {
        match path.split_once('.') {
            None => self.entries.get_mut(path),
            Some((head, rest)) => match self.entries.get_mut(head)? {
                Node::Table(table) => table.get_mut(rest),
                Node::Value(..) => None,
            },
        }
    }

    /// Puts a node at a dotted path, and tables on the way where there are none.
    pub(super) fn insert(&mut self, path: &str, node: Node) {
        match path.split_once('.') {
            None => {
                self.entries.insert(path.to_owned(), node);
            }
            Some((head, rest)) => {
                let origin = node.origin().clone();
                let below = self
                    .entries
                    .entry(head.to_owned())
                    .or_insert_with(|| Node::Table(Self::new(origin.clone())));
                if let Node::Value(..) = below {
                    *below = Node::Table(Self::new(origin));
                }
                if let Node::Table(table) = below {
                    table.insert(rest, node);
                }
            }
        }
    }

    /// Every value and every empty table, with its dotted path, in order of path.
    pub(super) fn leaves(&self) -> Vec<(String, &Node)> {
        let mut leaves = Vec::new();
        self.collect("", &mut leaves);
        leaves
    }

    fn collect<'a>(&'a self, prefix: &str, leaves: &mut Vec<(String, &'a Node)>) {
        for (key, node) in &self.entries {
            let path = join(prefix, key);
            match node {
                Node::Table(table) if !table.entries.is_empty() => table.collect(&path, leaves),
                _ => leaves.push((path, node)),
            }
        }
    }
}

/// `prefix.key`, or `key` at the root.
pub(super) fn join(prefix: &str, key: &str) -> String {
    if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") }
}

/// Parses what stands after `--set key=`: a TOML value, else the text itself.
pub(super) fn set_value(text: &str, key: &str) -> Result<Node, RecipeError> {
    let Ok(parsed) = DeValue::parse(text) else {
        return Ok(Node::Value(Value::String(text.to_owned()), Origin::Set));
    };
    match parsed.get_ref() {
        DeValue::Table(table) => {
            let source = Source { text, path: Path::new("--set").into() };
            let mut table = source.table(table, key, Origin::Set, true)?;
            table.set_origins(&Origin::Set);
            Ok(Node::Table(table))
        }
        value => Ok(Node::Value(plain(value, key, &Origin::Set)?, Origin::Set)),
    }
}

impl Table {
    fn set_origins(&mut self, origin: &Origin) {
        self.origin = origin.clone();
        for node in self.entries.values_mut() {
            match node {
                Node::Value(_, of_value) => *of_value = origin.clone(),
                Node::Table(table) => table.set_origins(origin),
            }
        }
    }
}

/// A text and its name, to turn byte offsets into origins.
struct Source<'a> {
    text: &'a str,
    path: Arc<Path>,
}

impl Source<'_> {
    fn origin(&self, offset: usize) -> Origin {
        let before = &self.text.as_bytes()[..offset.min(self.text.len())];
        let newlines = before.iter().filter(|byte| **byte == b'\n').count();
        Origin::File { path: Arc::clone(&self.path), line: u32::try_from(newlines + 1).unwrap_or(u32::MAX) }
    }

    fn table(
        &self,
        parsed: &DeTable<'_>,
        prefix: &str,
        origin: Origin,
        inline: bool,
    ) -> Result<Table, RecipeError> {
        let mut table = Table { inline, ..Table::new(origin) };
        for (key, value) in parsed {
            let path = join(prefix, key.get_ref());
            let origin = self.origin(key.span().start);
            let inline = self.text.as_bytes().get(value.span().start) == Some(&b'{');
            let node = match value.get_ref() {
                DeValue::Table(child) => Node::Table(self.table(child, &path, origin, inline)?),
                value => Node::Value(plain(value, &path, &origin)?, origin),
            };
            table.entries.insert(key.get_ref().to_string(), node);
        }
        Ok(table)
    }
}

/// A parsed value without its spans.
fn plain(value: &DeValue<'_>, key: &str, origin: &Origin) -> Result<Value, RecipeError> {
    let unrepresentable = |problem: &str| RecipeError::Value {
        origin: origin.clone(),
        key: key.to_owned(),
        problem: problem.to_owned(),
    };
    Ok(match value {
        DeValue::String(text) => Value::String(text.to_string()),
        DeValue::Integer(integer) => Value::Integer(
            i64::from_str_radix(integer.as_str(), integer.radix())
                .map_err(|_| unrepresentable("does not fit in 64 bits (at most 9223372036854775807)"))?,
        ),
        DeValue::Float(float) => {
            Value::Float(float.as_str().parse().map_err(|_| unrepresentable("is not a number"))?)
        }
        DeValue::Boolean(boolean) => Value::Boolean(*boolean),
        DeValue::Datetime(datetime) => Value::Datetime(*datetime),
        DeValue::Array(array) => Value::Array(plain_array(array, key, origin)?),
        DeValue::Table(table) => Value::Table(
            table
                .iter()
                .map(|(name, value)| {
                    Ok((
                        name.get_ref().to_string(),
                        plain(value.get_ref(), &join(key, name.get_ref()), origin)?,
                    ))
                })
                .collect::<Result<_, RecipeError>>()?,
        ),
    })
}

fn plain_array(array: &DeArray<'_>, key: &str, origin: &Origin) -> Result<Vec<Value>, RecipeError> {
    array.iter().map(|value| plain(value.get_ref(), key, origin)).collect()
}
