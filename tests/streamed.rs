//! Datasets in object storage: a run that streams its shards has the bits of one that has them on its disk, on any
//! number of workers; and where the set is larger than what is shuffled together, the bits still are the same for all.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;

use common::{Bench, RECIPE, Run};

const TEXT: &str = "text = [\"corpus/*.txt\"]\ntokenizer = { kind = \"bytes\" }\nheld_out = 0.05\n";

/// A bench with a built dataset and a place to publish it.
struct Published {
    bench: Bench,
    url: String,
}

impl Published {
    /// Shards of 4 KiB, twelve in all, shuffled `window` at a time.
    fn new(name: &str, recipe: &str, window: &str) -> Self {
        let bench = Bench::with(recipe);
        let url = match std::env::var("MATTOCK_TEST_S3_URL") {
            Ok(bucket) => format!("{bucket}/data-{name}-{}", std::process::id()),
            Err(_) => format!("file://{}", bench.path("published").display()),
        };
        let published = Self { bench, url };
        let output = published.build(window);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        published
    }

    fn build(&self, window: &str) -> std::process::Output {
        let arguments =
            ["data", "build", "recipe.toml", "--to", &self.url, "--shard", "4KiB", "--window", window];
        self.bench.command().args(arguments).output().unwrap()
    }

    /// Trains `recipe` on what was published, with a cache of its own.
    fn train(&self, recipe: &str, out: &str, arguments: &[&str]) -> Run {
        let streamed = format!("url = {:?}\ncache = \"96KiB\"\n", self.url);
        assert!(recipe.contains(TEXT));
        self.bench.write("streamed.toml", &recipe.replace(TEXT, &streamed));
        let mut command = self.bench.command();
        command.env("MATTOCK_CACHE", self.bench.path(&format!("cache-of-{out}")));
        command.args(["train", "streamed.toml", "--json", "--out", out]).args(arguments);
        Run::read(&command.output().unwrap(), self.bench.path(out))
    }

    /// Bytes that a run's cache of shards holds.
    fn cached(&self, out: &str) -> u64 {
        let shards = self.bench.path(&format!("cache-of-{out}")).join("shards");
        let folder = fs::read_dir(shards).unwrap().next().unwrap().unwrap().path();
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
    }
}

#[test]
fn a_streamed_run_has_the_bits_of_a_local_one() {
    let published = Published::new("small", RECIPE, "16");
    let local = published.bench.train("local", &["--workers", "1"]).done();
    for workers in ["1", "2", "3"] {
        let run = published.train(RECIPE, &format!("run-{workers}"), &["--workers", workers]).done();
        assert_eq!(run.curve(), local.curve(), "{workers} workers");
        assert_eq!(run.summary["held_out_loss"], local.summary["held_out_loss"]);
    }
}

#[test]
fn a_set_of_many_windows_has_the_same_bits_on_any_number_of_workers_and_when_resumed() {
    // More than an epoch, so that every window was drawn from, and two lanes of seven micro-batches of one sample each.
    let long = RECIPE.replace("steps = 8", "steps = 90").replace("every = 4", "every = 40");
    let recipe = long.replace("micro = 2", "micro = 1");
    let published = Published::new("large", &recipe, "3");
    let local = published.bench.train("local", &["--workers", "1"]).done();
    let one = published.train(&recipe, "one", &["--workers", "1"]).done();
    assert_ne!(one.hash(), local.hash(), "the order is another one, as documented");
    for workers in ["2", "3"] {
        let out = format!("run-{workers}");
        let run = published.train(&recipe, &out, &["--workers", workers]).done();
        assert_eq!(run.curve(), one.curve(), "{workers} workers");
        assert!(published.cached(&out) <= 96 << 10, "the cache holds {} bytes", published.cached(&out));
    }
    let resumed = published.train(&recipe, "run-3", &["--workers", "2", "--resume=40"]).done();
    assert_eq!(resumed.hash(), one.hash());
}

#[test]
fn what_cannot_be_streamed_is_refused_with_a_way_on() {
    let published = Published::new("refused", RECIPE, "3");
    let small = RECIPE.replace("steps = 8", "steps = 9");
    let run = published.train(&small, "small", &["--set", "data.cache=8KiB"]);
    assert_eq!(run.code, Some(2), "{}", run.errors);
    assert!(run.errors.contains("raise [data] cache"), "{}", run.errors);
    let run = published.train(RECIPE, "nowhere", &["--set", &format!("data.url={}/nowhere", published.url)]);
    assert_eq!(run.code, Some(2), "{}", run.errors);
    let way_on = if published.url.starts_with("s3://") { "mattock data build" } else { "check the path" };
    assert!(run.errors.contains(way_on) && run.errors.contains("nowhere"), "{}", run.errors);
    let run = published.train(RECIPE, "both", &["--set", "data.held_out=0.1"]);
    assert_eq!(run.code, Some(2), "{}", run.errors);
    assert!(run.errors.contains("held_out"), "{}", run.errors);
}

#[test]
fn publishing_again_is_the_same_and_another_dataset_is_refused() {
    let published = Published::new("again", RECIPE, "3");
    assert!(published.build("3").status.success());
    assert!(!published.build("4").status.success(), "the window is part of what a dataset is");
    published.bench.write("corpus/more.txt", "something else entirely, and rather more of it than before");
    let output = published.build("3");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && errors.contains("another dataset"), "{errors}");
}
