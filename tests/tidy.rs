//! House rules that a program can check, over every Rust file of the repository.
//!
//! What is deliberately absent: taste. These are the rules that, once broken, are seldom noticed in review.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

/// No file is longer: split it by meaning before it gets there.
const FILE_LINES_MAX: usize = 600;
/// No new function is longer.
const FUNCTION_LINES_MAX: usize = 60;
/// Functions that are, with their lengths: these may shrink, not grow, and leave the list when they are short.
const LONG_FUNCTIONS: &[(&str, &str, usize)] = &[];

/// Folders of modules that are pure: time, messages and randomness come in as arguments.
const PURE: &[&str] = &[
    "collectives/src/schedule",
    "collectives/src/frame.rs",
    "collectives/src/group/hierarchy/shares.rs",
    "collectives/src/layout.rs",
    "collectives/src/message/letters.rs",
    "collectives/src/message/mailbox.rs",
    "collectives/src/message/peer.rs",
    "collectives/src/shm/signal.rs",
    "collectives/src/topology.rs",
    "collectives/src/link/quic/steady/model.rs",
    "coordinator/src/membership",
    "coordinator/src/ledger.rs",
    "coordinator/src/past.rs",
    "src/launch/place.rs",
    "worker/exact/src",
    "worker/data/src/order.rs",
    "worker/data/src/permutation.rs",
    "worker/data/src/windows.rs",
    "worker/data/src/keys.rs",
    "worker/checkpoint/src/format",
    "worker/checkpoint/src/share.rs",
    "worker/checkpoint/src/slices.rs",
    "worker/src/balance.rs",
    "worker/src/bits.rs",
    "worker/src/commit.rs",
    "worker/src/estimate",
    "worker/src/journal.rs",
    "worker/src/schedule.rs",
    "worker/src/partition",
];
/// What a pure module never names.
const IMPURE: &[&str] = &[
    "tokio::",
    "Instant::now",
    "SystemTime",
    "std::thread",
    "std::net",
    "std::fs",
    "std::env",
    "UdpSocket",
    "rand::",
    "thread_rng",
];

/// What a crate never depends on, by folder: imports flow one way.
const FORBIDDEN: &[(&str, &[&str])] = &[
    (
        "collectives",
        &["mattock-coordinator", "mattock-worker", "mattock-exact", "mattock-data", "burn", "object_store"],
    ),
    (
        "coordinator",
        &["mattock-worker", "mattock-exact", "mattock-data", "mattock-checkpoint", "burn", "object_store"],
    ),
    ("worker/exact", &["mattock-", "burn", "tokio", "rand"]),
    ("worker/data", &["mattock-", "burn", "tokio"]),
    ("worker/checkpoint", &["mattock-", "burn"]),
    ("worker/kernels", &["mattock-", "tokio"]),
];

struct Source {
    path: String,
    text: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        let name = entry.file_name();
        if path.is_dir() && name != "target" && !name.to_string_lossy().starts_with('.') {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn sources() -> Vec<Source> {
    let mut files = Vec::new();
    rust_files(root(), &mut files);
    files.sort();
    assert!(files.len() > 20, "the walk over the repository found too little");
    let read = |path: PathBuf| Source {
        path: path.strip_prefix(root()).unwrap().to_string_lossy().into_owned(),
        text: fs::read_to_string(&path).unwrap(),
    };
    files.into_iter().map(read).collect()
}

fn report(rule: &str, faults: &[String]) {
    assert!(faults.is_empty(), "{rule}:\n  {}", faults.join("\n  "));
}

/// Functions of a formatted file: (name, lines), by the indentation of the closing brace.
fn functions(text: &str) -> Vec<(String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let code = line.trim_start();
        let indent = &line[..line.len() - code.len()];
        let words: Vec<&str> = code.split_whitespace().take(6).collect();
        let Some(position) = words.iter().position(|&word| word == "fn") else { continue };
        let qualifiers = ["pub", "pub(crate)", "pub(super)", "const", "async", "unsafe"];
        if !words[..position].iter().all(|word| qualifiers.contains(word)) || code.ends_with([';', '}']) {
            continue;
        }
        let closing = format!("{indent}}}");
        let Some(length) = lines[start..].iter().position(|line| *line == closing) else { continue };
        let name = words.get(position + 1).map_or("", |word| word.split(['(', '<']).next().unwrap_or(""));
        found.push((name.to_owned(), length + 1));
    }
    found
}

#[test]
fn every_file_opens_with_its_purpose() {
    let faults: Vec<String> = sources()
        .iter()
        .filter(|source| {
            !["//!", "#![doc = include_str!"].iter().any(|header| source.text.starts_with(header))
        })
        .map(|source| source.path.clone())
        .collect();
    report("every file opens with a `//!` header", &faults);
}

#[test]
fn no_file_outgrows_its_purpose() {
    let long = |source: &Source| {
        let lines = source.text.lines().count();
        (lines > FILE_LINES_MAX).then(|| format!("{}: {lines} lines", source.path))
    };
    report(
        &format!("no file is over {FILE_LINES_MAX} lines"),
        &sources().iter().filter_map(long).collect::<Vec<_>>(),
    );
}

#[test]
fn functions_ratchet_rather_than_grow() {
    let mut faults = Vec::new();
    let mut seen = Vec::new();
    for source in sources() {
        for (name, lines) in functions(&source.text) {
            let listed =
                LONG_FUNCTIONS.iter().find(|(path, function, _)| *path == source.path && *function == name);
            let limit = listed.map_or(FUNCTION_LINES_MAX, |listed| listed.2);
            if lines > limit {
                faults.push(format!("{}: {name} has {lines} lines, {limit} are allowed", source.path));
            }
            if let Some(listed) = listed {
                seen.push(*listed);
                if lines < listed.2 {
                    faults.push(format!("{}: {name} has shrunk to {lines}: lower its entry", source.path));
                }
            }
        }
    }
    let gone = LONG_FUNCTIONS.iter().filter(|listed| !seen.contains(listed));
    faults.extend(gone.map(|(path, name, _)| format!("{path}: {name} is gone: drop its entry")));
    report("functions fit on a screen", &faults);
}

#[test]
fn pure_modules_touch_nothing_outside() {
    let mut faults = Vec::new();
    let sources = sources();
    for pure in PURE {
        let files: Vec<&Source> = sources.iter().filter(|source| source.path.starts_with(pure)).collect();
        assert!(!files.is_empty(), "{pure} is listed as pure and does not exist");
        // Tests, inside a file or in one of their own, bring the clock that the module does not have.
        for source in files.into_iter().filter(|source| !source.path.ends_with("/tests.rs")) {
            let code = source.text.split("#[cfg(test)]").next().unwrap_or("");
            let named = IMPURE.iter().filter(|word| code.contains(**word));
            faults.extend(named.map(|word| format!("{} names {word}", source.path)));
        }
    }
    report("pure modules have no clock, socket, thread, file or randomness", &faults);
}

#[test]
fn imports_flow_one_way() {
    let mut faults = Vec::new();
    for (folder, forbidden) in FORBIDDEN {
        let manifest = fs::read_to_string(root().join(folder).join("Cargo.toml")).unwrap();
        let dependencies = manifest.split("[dependencies]").nth(1).unwrap_or("");
        for line in dependencies.lines().take_while(|line| !line.starts_with("[dev-")) {
            let name = line.split(['.', ' ', '=']).next().unwrap_or("");
            let found = forbidden
                .iter()
                .filter(|word| name == **word || word.ends_with('-') && name.starts_with(**word));
            faults.extend(found.map(|word| format!("{folder} depends on {word}")));
        }
    }
    report("imports flow one way", &faults);
}

#[test]
fn the_function_scanner_sees_what_it_should() {
    let text = "impl A {\n    pub(crate) async fn long<T>(\n        x: T,\n    ) -> u8 {\n        1\n    }\n}\n\nfn b() {}\n\nfn c() {\n}\n";
    assert_eq!(functions(text), vec![("long".to_owned(), 5), ("c".to_owned(), 2)]);
}
