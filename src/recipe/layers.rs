//! From files and arguments to one tree: base recipes below the recipe, `--set` on top.
//!
//! Paths are made absolute while it is known which file wrote them, so that a run does not depend on the
//! folder that a worker was started in.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use toml::Value;

use super::tree::{Node, Table, set_value};
use super::{Origin, RecipeError};

/// A recipe longer than this is a mistake.
const RECIPE_BYTES_MAX: u64 = 1 << 20;
/// A chain of `extends` longer than this is a mistake.
const EXTENDS_MAX: usize = 16;
/// Names in the key of a `--set`.
const SET_NAMES_MAX: usize = 16;

/// The recipe at `path` over its bases, and `sets` over both.
pub(super) fn load(path: &Path, sets: &[String]) -> Result<Table, RecipeError> {
    let mut tree = with_bases(path, &mut Vec::new())?;
    let folder = folder_of(path)?;
    for argument in sets {
        let mut over = set(argument)?;
        make_absolute(&mut over, &folder)?;
        tree.overlay(over);
    }
    Ok(tree)
}

fn with_bases(path: &Path, above: &mut Vec<PathBuf>) -> Result<Table, RecipeError> {
    let mut tree = Table::parse(&read(path)?, path)?;
    make_absolute(&mut tree, &folder_of(path)?)?;
    let Some(extends) = tree.entries.remove("extends") else { return Ok(tree) };
    let origin = extends.origin().clone();
    let refuse = |problem: String| RecipeError::Extends { origin: origin.clone(), problem };
    let Node::Value(Value::String(base), _) = extends else {
        return Err(refuse("must be one path, such as \"base.toml\"".into()));
    };
    above.push(identity(path));
    let base = path.parent().unwrap_or(Path::new("")).join(base);
    if above.contains(&identity(&base)) {
        return Err(refuse(format!("comes back to {}: a recipe cannot extend itself", base.display())));
    }
    if above.len() > EXTENDS_MAX {
        return Err(refuse(format!("goes on for more than {EXTENDS_MAX} recipes")));
    }
    let mut whole = with_bases(&base, above)?;
    whole.origin = tree.origin.clone();
    whole.overlay(tree);
    Ok(whole)
}

fn read(path: &Path) -> Result<String, RecipeError> {
    let failed = |source| RecipeError::Read { path: path.to_owned(), source };
    let file = fs::File::open(path).map_err(failed)?;
    let mut text = String::new();
    let read = file.take(RECIPE_BYTES_MAX + 1).read_to_string(&mut text).map_err(failed)?;
    if read as u64 > RECIPE_BYTES_MAX {
        return Err(failed(std::io::Error::other(format!("it is longer than {RECIPE_BYTES_MAX} bytes"))));
    }
    Ok(text)
}

/// What makes two paths the same file.
fn identity(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

fn folder_of(path: &Path) -> Result<PathBuf, RecipeError> {
    let failed = |source| RecipeError::Read { path: path.to_owned(), source };
    Ok(std::path::absolute(path).map_err(failed)?.parent().unwrap_or(Path::new("/")).to_owned())
}

fn set(argument: &str) -> Result<Table, RecipeError> {
    let refuse =
        |problem: &str| RecipeError::Set { argument: argument.to_owned(), problem: problem.to_owned() };
    let (key, value) =
        argument.split_once('=').ok_or_else(|| refuse("write key=value, such as train.steps=100"))?;
    let (key, value) = (key.trim(), value.trim());
    let bare = |name: &str| {
        !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')
    };
    if !key.split('.').all(bare) || key.split('.').count() > SET_NAMES_MAX {
        return Err(refuse("the key must be names joined by dots, such as train.steps"));
    }
    if key == "extends" {
        return Err(refuse("`extends` can only be written in a recipe"));
    }
    let mut tree = Table::new(Origin::Set);
    tree.insert(key, set_value(value, key)?);
    Ok(tree)
}

/// Makes `data.text`, `data.tokenizer.file`, `checkpoint.to` and `model.init` independent of the current folder.
fn make_absolute(tree: &mut Table, folder: &Path) -> Result<(), RecipeError> {
    let folder = folder.to_str().ok_or_else(|| RecipeError::Read {
        path: folder.to_owned(),
        source: std::io::Error::other("the folder's name is not UTF-8"),
    })?;
    if let Some(Node::Value(value, _)) = tree.get_mut("data.text") {
        let folder = glob::Pattern::escape(folder);
        match value {
            Value::Array(globs) => globs.iter_mut().for_each(|glob| join_text(&folder, glob)),
            one => join_text(&folder, one),
        }
    }
    for key in ["data.tokenizer.file", "checkpoint.to", "model.init"] {
        if let Some(Node::Value(value, _)) = tree.get_mut(key) {
            join_text(folder, value);
        }
    }
    Ok(())
}

/// Leaves alone what is absolute already, a URL, or starts with a variable; and what isn't text, for others
/// to refuse.
fn join_text(folder: &str, value: &mut Value) {
    if let Value::String(path) = value {
        let stands_alone = path.is_empty() || path.starts_with(['/', '$', '~', '{']) || path.contains("://");
        if !stands_alone {
            *path = format!("{}/{path}", folder.trim_end_matches('/'));
        }
    }
}
