//! What the tests with real processes share: a small recipe, and the program run on it.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// A folder with a corpus, a recipe, and the runs made from it.
pub(crate) struct Bench {
    folder: tempfile::TempDir,
}

/// What a run printed and left behind.
pub(crate) struct Run {
    pub(crate) code: Option<i32>,
    pub(crate) summary: Value,
    pub(crate) errors: String,
    pub(crate) out: PathBuf,
}

/// A model and a batch small enough for tests.
pub(crate) const RECIPE: &str = r#"
name = "tiny"
seed = 3

[model]
family = "gpt"
layers = 2
heads = 2
dim = 32
context = 24

[data]
text = ["corpus/*.txt"]
tokenizer = { kind = "bytes" }
held_out = 0.05

[batch]
size = 14
micro = 2

[optimizer]
name = "adamw"
lr = 3e-3
betas = [0.9, 0.95]
weight_decay = 0.1
clip = 1.0
schedule = { kind = "cosine", warmup = 2, final = 0.1 }

[train]
steps = 8

[checkpoint]
every = 4

[elastic]
timeout = "20s"
"#;

impl Bench {
    pub(crate) fn new() -> Self {
        Self::with(RECIPE)
    }

    /// A bench whose recipe is `recipe`.
    pub(crate) fn with(recipe: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let corpus = folder.path().join("corpus");
        fs::create_dir(&corpus).unwrap();
        for file in 0..4u32 {
            fs::write(corpus.join(format!("{file}.txt")), text(file)).unwrap();
        }
        fs::write(folder.path().join("recipe.toml"), recipe).unwrap();
        Self { folder }
    }

    /// Adds a file, with its folder.
    pub(crate) fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The program, with its caches inside the bench.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mattock"));
        command
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env_remove("RUST_LOG")
            .current_dir(self.folder.path());
        command
    }

    /// `train recipe.toml --json --out OUT` with further arguments.
    pub(crate) fn train(&self, out: &str, arguments: &[&str]) -> Run {
        let output =
            self.command().args(["train", "recipe.toml", "--json", "--out", out]).args(arguments).output();
        Run::read(&output.unwrap(), self.path(out))
    }
}

impl Run {
    pub(crate) fn read(output: &Output, out: PathBuf) -> Self {
        let summary = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
        Self {
            code: output.status.code(),
            summary,
            errors: String::from_utf8_lossy(&output.stderr).into_owned(),
            out,
        }
    }

    /// This run, which must have ended well.
    #[track_caller]
    pub(crate) fn done(self) -> Self {
        assert_eq!(self.code, Some(0), "the run failed:\n{}", self.errors);
        self
    }

    /// The final state hash.
    pub(crate) fn hash(&self) -> String {
        self.summary["state_hash"].as_str().unwrap().to_owned()
    }

    /// The lines of `events.jsonl` that are steps.
    pub(crate) fn steps(&self) -> Vec<Value> {
        steps(&self.out)
    }

    /// (loss, state hash) of each step.
    pub(crate) fn curve(&self) -> Vec<(f64, String)> {
        let point =
            |step: Value| (step["loss"].as_f64().unwrap(), step["state_hash"].as_str().unwrap().to_owned());
        self.steps().into_iter().map(point).collect()
    }
}

/// The step events of a run's folder.
pub(crate) fn steps(out: &Path) -> Vec<Value> {
    let text = fs::read_to_string(out.join("events.jsonl")).unwrap();
    let events = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    events.filter(|event| event["event"] == "step").collect()
}

/// Some 6 KB of words in an order that a small model can learn something of.
fn text(seed: u32) -> String {
    let words = [
        "the", "ring", "carries", "every", "gradient", "once", "and", "no", "worker", "leaves", "a", "trace",
    ];
    let mut state = u64::from(seed) + 1;
    let mut text = String::new();
    while text.len() < 6000 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        text.push_str(words[(state >> 33) as usize % words.len()]);
        text.push(if (state >> 60) == 0 { '\n' } else { ' ' });
    }
    text
}
