//! The resolved recipe as text: valid TOML with every default filled in, each value's origin as a comment
//! beside it.

use toml::Value;

use super::keys::{TASK_TABLES, position};
use super::tree::{Node, Table, join};

/// Arrays wider than this are written one element a line.
const WIDTH_MAX: usize = 80;

/// The whole tree as TOML.
pub(super) fn render(tree: &Table) -> String {
    let mut text = format!(
        "# Resolved by mattock {}. Each value's origin stands beside it.\n",
        env!("CARGO_PKG_VERSION")
    );
    let (values, mut sections): (Vec<_>, Vec<_>) =
        tree.entries.iter().partition(|(_, node)| matches!(node, Node::Value(..)));
    lines(&mut text, "", values.into_iter());
    sections.sort_by_key(|(name, _)| match TASK_TABLES.iter().position(|table| table == name) {
        Some(place) => (0, place),
        None => (1, position(name)),
    });
    for (name, node) in sections {
        if let Node::Table(table) = node {
            text.push_str(&format!("\n[{}]\n", key(name)));
            lines(&mut text, name, table.entries.iter());
        }
    }
    text
}

fn lines<'a>(text: &mut String, prefix: &str, entries: impl Iterator<Item = (&'a String, &'a Node)>) {
    let mut entries: Vec<_> = entries.collect();
    entries.sort_by_key(|(name, _)| position(&join(prefix, name)));
    let rendered: Vec<(String, String)> = entries
        .into_iter()
        .map(|(name, node)| {
            let path = join(prefix, name);
            (format!("{} = {}", key(name), value_of(&path, node)), origins_of(node))
        })
        .collect();
    let fits = |line: &&(String, String)| line.0.len() <= WIDTH_MAX && !line.0.contains('\n');
    let width = rendered.iter().filter(fits).map(|(line, _)| line.len()).max().unwrap_or(0);
    for (line, origins) in rendered {
        text.push_str(&format!("{line:width$}  # {origins}\n"));
    }
}

fn value_of(path: &str, node: &Node) -> String {
    match node {
        Node::Value(value, _) => plain(value),
        Node::Table(table) => {
            let mut entries: Vec<_> = table.entries.iter().collect();
            entries.sort_by_key(|(name, _)| position(&join(path, name)));
            inline(entries.into_iter().map(|(name, node)| (name, value_of(&join(path, name), node))))
        }
    }
}

/// A value on one line; only long lists are broken.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => quoted(text),
        Value::Float(number) if number.is_nan() => "nan".to_owned(),
        Value::Float(number) => format!("{number:?}"),
        Value::Array(values) => array(values),
        Value::Table(table) => inline(table.iter().map(|(name, value)| (name, plain(value)))),
        Value::Integer(_) | Value::Boolean(_) | Value::Datetime(_) => value.to_string(),
    }
}

fn inline<'a>(fields: impl Iterator<Item = (&'a String, String)>) -> String {
    let fields: Vec<String> = fields.map(|(name, value)| format!("{} = {value}", key(name))).collect();
    if fields.is_empty() { "{}".to_owned() } else { format!("{{ {} }}", fields.join(", ")) }
}

fn array(values: &[Value]) -> String {
    let values: Vec<String> = values.iter().map(plain).collect();
    let short = format!("[{}]", values.join(", "));
    if short.len() <= WIDTH_MAX { short } else { format!("[\n    {},\n]", values.join(",\n    ")) }
}

/// One origin, or all the different ones of an inline table. On one line whatever files are called.
fn origins_of(node: &Node) -> String {
    let mut origins: Vec<String> = Vec::new();
    let mut add = |node: &Node| {
        let origin = node.origin().to_string().replace(|c: char| c.is_control(), "?");
        if !origins.contains(&origin) {
            origins.push(origin);
        }
    };
    match node {
        Node::Table(table) if !table.entries.is_empty() => {
            table.leaves().into_iter().for_each(|(_, leaf)| add(leaf));
        }
        _ => add(node),
    }
    origins.join(", ")
}

/// A key as TOML writes it.
fn key(name: &str) -> String {
    let bare = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
    if bare { name.to_owned() } else { quoted(name) }
}

/// A basic string: quoted, and on one line whatever it holds.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_ascii_control() => quoted.push_str(&format!("\\u{:04X}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}
