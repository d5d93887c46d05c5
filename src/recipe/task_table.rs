//! The task's own tables, `[model]` and `[data]`: handed over as JSON, and the task's complaints brought
//! back home.
//!
//! The task reads its table with serde and `deny_unknown_fields`. serde's messages name a field but no
//! file, line or path; what it says is matched against the recipe here, so that a wrong key of a task reads
//! like any other.

use mattock_worker::plan;
use serde_json::Value as Json;
use toml::Value;

use super::keys::nearest_of;
use super::tree::{Node, Table};
use super::{Origin, RecipeError};

/// A table of the recipe as the task gets it; empty where there is none.
pub(super) fn to_json(tree: &Table, name: &str) -> Result<plan::Table, RecipeError> {
    match tree.get(name) {
        None => Ok(plan::Table::new()),
        Some(Node::Table(table)) => object(table, name),
        Some(Node::Value(value, origin)) => Err(RecipeError::Value {
            origin: origin.clone(),
            key: name.to_owned(),
            problem: format!("is {value}, expected a table"),
        }),
    }
}

fn object(table: &Table, path: &str) -> Result<plan::Table, RecipeError> {
    let mut object = plan::Table::new();
    for (key, node) in &table.entries {
        let path = format!("{path}.{key}");
        let json = match node {
            Node::Table(table) => Json::Object(self::object(table, &path)?),
            Node::Value(value, origin) => json(value).ok_or_else(|| RecipeError::Value {
                origin: origin.clone(),
                key: path,
                problem: format!("is {value}, expected finite numbers only"),
            })?,
        };
        object.insert(key.clone(), json);
    }
    Ok(object)
}

fn json(value: &Value) -> Option<Json> {
    Some(match value {
        Value::String(text) => Json::String(text.clone()),
        Value::Integer(number) => Json::from(*number),
        Value::Float(number) => Json::Number(serde_json::Number::from_f64(*number)?),
        Value::Boolean(boolean) => Json::Bool(*boolean),
        Value::Datetime(datetime) => Json::String(datetime.to_string()),
        Value::Array(values) => Json::Array(values.iter().map(json).collect::<Option<_>>()?),
        Value::Table(table) => Json::Object(
            table.iter().map(|(key, value)| Some((key.clone(), json(value)?))).collect::<Option<_>>()?,
        ),
    })
}

/// One value of a task's table: its dotted path, its text and where it was written.
pub(super) struct Leaf<'a> {
    pub(super) path: &'a str,
    pub(super) value: &'a Value,
    pub(super) origin: &'a Origin,
}

/// Turns what serde said about the table at `path` into an error with key, line and nearest name.
pub(super) fn explain(path: &str, message: &str, leaves: &[Leaf<'_>]) -> RecipeError {
    let quoted = quoted_names(message);
    let expected = quoted.iter().skip(1).copied();
    let first = quoted.first().copied().unwrap_or_default();
    let table = || leaves.first().map_or(Origin::Default, |leaf| leaf.origin.clone());
    let value = |leaf: &Leaf<'_>, problem: String| RecipeError::Value {
        origin: leaf.origin.clone(),
        key: leaf.path.to_owned(),
        problem,
    };

    if message.starts_with("unknown field")
        && let Some(leaf) = leaves.iter().find(|leaf| names(leaf.path, first))
    {
        let key = leaf.path.to_owned();
        return match nearest_of(first, expected) {
            Some(nearest) => {
                RecipeError::UnknownKey { origin: leaf.origin.clone(), key, nearest: nearest.to_owned() }
            }
            None => value(leaf, "is not a key here: this table takes none".to_owned()),
        };
    }
    if message.starts_with("unknown variant")
        && let Some(leaf) = leaves.iter().find(|leaf| leaf.value.as_str() == Some(first))
    {
        let hint = nearest_of(first, expected).map(|nearest| format!("; the nearest is {nearest:?}"));
        let names: Vec<String> = quoted.iter().skip(1).map(|name| format!("{name:?}")).collect();
        let problem = format!("is {first:?}, expected {}{}", names.join(", "), hint.unwrap_or_default());
        return value(leaf, problem);
    }
    if let Some((got, wanted)) =
        message.strip_prefix("invalid ").and_then(|rest| rest.split_once(": ")?.1.rsplit_once(", expected "))
        && let [leaf] = leaves.iter().filter(|leaf| is(leaf.value, got)).collect::<Vec<_>>()[..]
    {
        return value(leaf, format!("is {}, expected {wanted}", leaf.value));
    }
    RecipeError::Task { origin: table(), table: path.to_owned(), message: message.to_owned() }
}

/// Whether a dotted path has this name in it.
fn names(path: &str, name: &str) -> bool {
    path.ends_with(&format!(".{name}")) || path.contains(&format!(".{name}."))
}

/// Whether serde's description of a value (`string "a"`, ``integer `4` ``) fits this one.
fn is(value: &Value, described: &str) -> bool {
    match value {
        Value::String(text) => described == format!("string {text:?}"),
        Value::Integer(number) => described == format!("integer `{number}`"),
        Value::Float(number) => {
            described
                .strip_prefix("floating point `")
                .and_then(|rest| rest.strip_suffix('`'))
                .and_then(|text| text.parse().ok())
                == Some(*number)
        }
        Value::Boolean(boolean) => described == format!("boolean `{boolean}`"),
        Value::Array(_) => described == "sequence",
        Value::Datetime(_) | Value::Table(_) => described == "map",
    }
}

/// What stands between backticks.
fn quoted_names(message: &str) -> Vec<&str> {
    message.split('`').skip(1).step_by(2).collect()
}
