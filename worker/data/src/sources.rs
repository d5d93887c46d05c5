//! Which files a dataset is made of, in an order that is the same on every machine.
//!
//! Sources of locked dependencies, as Cargo unpacked them, lie under `$CARGO_HOME/registry/src/INDEX/NAME-VERSION/`,
//! where the name of INDEX differs between machines, and the same crate may lie under two of them. So files are named,
//! ordered and deduplicated by their path below INDEX; other files by their path below what their glob fixes.

use std::collections::BTreeMap;
use std::env;
use std::path::{Component, Path, PathBuf};

use crate::DataError;

/// More files than this are hardly meant.
const FILES_MAX: usize = 1_000_000;

/// A file of the dataset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFile {
    /// What it is ordered and deduplicated by.
    pub name: String,
    /// Where it lies here.
    pub path: PathBuf,
}

/// Expands globs and folders into files, ordered by name.
///
/// # Errors
/// Where a pattern is malformed, or matches nothing.
pub fn sources(patterns: &[String]) -> Result<Vec<SourceFile>, DataError> {
    let mut files = BTreeMap::new();
    for pattern in patterns {
        let expanded = expand(pattern)?;
        let before = files.len();
        let mut matched = false;
        for path in matches(pattern, &expanded)? {
            matched = true;
            files.entry(name(&path, &expanded)).or_insert(path);
            if files.len() > FILES_MAX {
                return Err(fault(pattern, format!("matches more than {FILES_MAX} files: narrow it")));
            }
        }
        if !matched {
            let reason = format!("matches no file (looked for {}): check the path", expanded.display());
            return Err(fault(pattern, reason));
        }
        tracing::debug!(%pattern, files = files.len() - before, "expanded");
    }
    if files.is_empty() {
        return Err(fault("", "names no files: give at least one glob or folder".to_owned()));
    }
    Ok(files.into_iter().map(|(name, path)| SourceFile { name, path }).collect())
}

/// Names and versions of the crates that globs under Cargo's registry ask for.
pub fn registry_crates(patterns: &[String]) -> Vec<(String, String)> {
    let found = patterns.iter().filter_map(|pattern| {
        let folder = pattern.split("registry/src/*/").nth(1)?.split('/').next()?;
        let split = folder
            .match_indices('-')
            .find(|(at, _)| folder[at + 1..].starts_with(|c: char| c.is_ascii_digit()))?;
        Some((folder[..split.0].to_owned(), folder[split.0 + 1..].to_owned()))
    });
    found.collect()
}

fn fault(pattern: &str, reason: String) -> DataError {
    DataError::Pattern { pattern: pattern.to_owned(), reason }
}

/// Replaces `~` and `$VAR` at the start.
fn expand(pattern: &str) -> Result<PathBuf, DataError> {
    let home = || env::var("HOME").map_err(|_| fault(pattern, "needs $HOME, which is not set".to_owned()));
    let (head, rest) = pattern.split_once('/').unwrap_or((pattern, ""));
    let head = match head.strip_prefix('$') {
        None if head == "~" => home()?,
        None => return Ok(PathBuf::from(pattern)),
        Some(variable) => match env::var(variable) {
            Ok(value) => value,
            Err(_) if variable == "CARGO_HOME" => format!("{}/.cargo", home()?),
            Err(_) => return Err(fault(pattern, format!("needs ${variable}, which is not set"))),
        },
    };
    Ok(Path::new(&head).join(rest))
}

/// The files that match, in no particular order.
fn matches(pattern: &str, expanded: &Path) -> Result<Vec<PathBuf>, DataError> {
    let text = expanded.to_str().ok_or_else(|| fault(pattern, "is not UTF-8".to_owned()))?;
    let text =
        if expanded.is_dir() { format!("{}/**/*", glob::Pattern::escape(text)) } else { text.to_owned() };
    let paths = glob::glob(&text).map_err(|error| fault(pattern, format!("is no valid glob: {error}")))?;
    let mut files = Vec::new();
    for path in paths {
        let path = path.map_err(|error| fault(pattern, format!("cannot be walked: {error}")))?;
        if path.is_file() {
            files.push(path);
        }
    }
    Ok(files)
}

/// The path below Cargo's index folder, or else below the part of the pattern without wildcards.
fn name(path: &Path, expanded: &Path) -> String {
    let parts: Vec<Component<'_>> = path.components().collect();
    let registry = parts
        .windows(2)
        .position(|pair| pair == [Component::Normal("registry".as_ref()), Component::Normal("src".as_ref())]);
    let skip = match registry {
        Some(at) => at + 3,
        None => expanded.components().take_while(|part| !is_wild(part)).count().min(parts.len() - 1),
    };
    let tail: PathBuf = parts[skip..].iter().collect();
    tail.to_string_lossy().into_owned()
}

fn is_wild(part: &Component<'_>) -> bool {
    part.as_os_str().to_string_lossy().contains(['*', '?', '['])
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn write(folder: &Path, name: &str) {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, name).unwrap();
    }

    fn names(patterns: &[String]) -> Vec<String> {
        sources(patterns).unwrap().into_iter().map(|file| file.name).collect()
    }

    #[test]
    fn registry_files_are_named_below_the_index_and_taken_once() {
        let home = tempfile::tempdir().unwrap();
        for index in ["index.crates.io-1", "mirror-2"] {
            write(home.path(), &format!("registry/src/{index}/b-1.0.0/src/lib.rs"));
            write(home.path(), &format!("registry/src/{index}/a-2.0.0/src/x.rs"));
        }
        let glob = |name: &str| format!("{}/registry/src/*/{name}/src/**/*.rs", home.path().display());
        assert_eq!(names(&[glob("b-1.0.0"), glob("a-2.0.0")]), ["a-2.0.0/src/x.rs", "b-1.0.0/src/lib.rs"]);
    }

    #[test]
    fn a_folder_stands_for_all_below_it() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "z.txt");
        write(folder.path(), "deep/a.txt");
        let names = names(&[folder.path().display().to_string()]);
        assert_eq!(names.len(), 2);
        assert!(names[0].ends_with("a.txt") && names[1].ends_with("z.txt"), "{names:?}");
    }

    #[test]
    fn a_glob_that_matches_nothing_is_named() {
        let error = sources(&["/nowhere/*.txt".to_owned()]).unwrap_err().to_string();
        assert!(error.contains("/nowhere/*.txt") && error.contains("matches no file"), "{error}");
        let error = sources(&["$MATTOCK_NO_SUCH_VARIABLE/x".to_owned()]).unwrap_err().to_string();
        assert!(error.contains("MATTOCK_NO_SUCH_VARIABLE"), "{error}");
    }

    #[test]
    fn crates_are_read_from_globs() {
        let globs = [
            "$CARGO_HOME/registry/src/*/tokio-1.54.1/src/**/*.rs",
            "$CARGO_HOME/registry/src/*/a-b2-0.3.0-rc.1/*.rs",
        ];
        let crates = registry_crates(&globs.map(str::to_owned));
        let expected = [("tokio", "1.54.1"), ("a-b2", "0.3.0-rc.1")];
        assert_eq!(crates, expected.map(|(name, version)| (name.to_owned(), version.to_owned())));
    }
}
