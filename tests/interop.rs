//! GPT-2 to and fro between `transformers` and us, without Python: a small model that it saved, and what it computes with
//! it (`scripts/interop golden` writes both). What is damaged or of another model is refused by name before a run begins.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use common::Bench;
use common::watched::LONG;
use serde_json::Value;

/// Largest difference of a logit.
const LOGITS: f64 = 1e-4;
/// Largest difference of a gradient, relative to the largest of its tensor.
const GRADIENTS: f64 = 1e-3;
/// What of the bench's recipe is not as in the golden model.
const SHAPE: [&str; 4] = ["--set", "model.dim=8", "--set", "model.context=16"];

fn golden(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gpt2").join(file)
}

fn run(bench: &Bench, arguments: &[&str]) -> Output {
    bench.command().args(arguments).output().unwrap()
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What transformers computed.
fn expected() -> Value {
    serde_json::from_slice(&fs::read(golden("expected.json")).unwrap()).unwrap()
}

/// What we compute for the same tokens with the weights in a folder.
fn computed(bench: &Bench, folder: &Path) -> Value {
    let tokens: Vec<String> = expected()["tokens"].as_array().unwrap().iter().map(Value::to_string).collect();
    let folder = folder.to_str().unwrap();
    let output = run(bench, &["checkpoint", "logits", folder, "--tokens", &tokens.join(","), "--gradients"]);
    assert!(output.status.success(), "{}", errors(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn numbers(values: &Value) -> Vec<f64> {
    values.as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect()
}

/// The largest difference, and the largest number.
fn difference(ours: &Value, theirs: &Value) -> (f64, f64) {
    let (ours, theirs) = (numbers(ours), numbers(theirs));
    assert_eq!(ours.len(), theirs.len());
    let largest = |numbers: &mut dyn Iterator<Item = f64>| numbers.map(f64::abs).fold(0.0, f64::max);
    (largest(&mut ours.iter().zip(&theirs).map(|(a, b)| a - b)), largest(&mut theirs.iter().copied()))
}

#[test]
fn what_transformers_saved_has_its_logits_and_gradients_here() {
    let (ours, theirs) = (computed(&Bench::new(), &golden("")), expected());
    let rows = |of: &Value| of["logits"].as_array().unwrap().clone();
    assert_eq!(rows(&ours).len(), rows(&theirs).len());
    for (ours, theirs) in rows(&ours).iter().zip(rows(&theirs)) {
        let (difference, _) = difference(ours, &theirs);
        assert!(difference <= LOGITS, "logits differ by {difference:e}");
    }
    let loss = |of: &Value| of["loss"].as_f64().unwrap();
    assert!((loss(&ours) - loss(&theirs)).abs() <= LOGITS);
    let names = |of: &Value| of["gradients"].as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&ours), names(&theirs));
    for name in names(&theirs) {
        let (difference, largest) = difference(&ours["gradients"][&name], &theirs["gradients"][&name]);
        assert!(
            difference <= GRADIENTS * largest,
            "{name}: gradients differ by {difference:e} of {largest:e}"
        );
    }
}

#[test]
fn a_run_starts_from_the_weights_on_any_number_of_workers_and_saves_them_as_they_were() {
    let bench = Bench::new();
    let init = format!("model.init={}", golden("").display());
    let set = [&SHAPE[..], &["--set", &init]].concat();
    let output =
        run(&bench, &[&["checkpoint", "init", "recipe.toml", "--out", "initial"], &set[..]].concat());
    assert!(output.status.success(), "{}", errors(&output));
    let saved = bench.path("initial/step-00000000");
    assert_eq!(computed(&bench, &saved), computed(&bench, &golden("")));

    let train = |out: &str, more: &[&str]| {
        bench.train(out, &[&["--device", "cpu", "--set", "train.steps=3"], &set[..], more].concat()).done()
    };
    let one = train("one", &["--workers", "1"]);
    let divided = train("divided", &["--workers", "2", "--set", "parallel.shard=full"]);
    assert_eq!(one.curve(), divided.curve());
    // Of a run of several workers, weights are several files and an index.
    let trained = |out: &str| computed(&bench, &bench.path(out).join("checkpoints/step-00000003"));
    assert!(bench.path("divided/checkpoints/step-00000003/model.safetensors.index.json").exists());
    assert_eq!(trained("one"), trained("divided"));
    let drawn = bench.train("drawn", &[&["--set", "train.steps=3"], &SHAPE[..]].concat()).done();
    assert_ne!(drawn.hash(), one.hash());
}

/// A copy of the golden model in the bench, as a recipe may start from it.
fn copy(bench: &Bench, name: &str) -> PathBuf {
    let folder = bench.path(name);
    fs::create_dir(&folder).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(golden(file), folder.join(file)).unwrap();
    }
    folder
}

/// Replaces text of the same length in the header of the weights, or any text in another file.
fn edit(file: &Path, from: &str, to: &str) {
    let mut bytes = fs::read(file).unwrap();
    let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
    bytes.splice(at..at + from.len(), to.bytes());
    fs::write(file, bytes).unwrap();
}

/// What `train` says of a recipe that starts from the golden model after it was damaged; it must leave nothing behind.
fn refusal(damage: impl FnOnce(&Path)) -> String {
    let bench = Bench::new();
    let folder = copy(&bench, "gpt2");
    damage(&folder);
    let run = bench.train("run", &[&SHAPE[..], &["--set", "model.init=gpt2"]].concat());
    assert_eq!(run.code, Some(2), "{}", run.errors);
    assert!(!bench.path("run/checkpoints").exists(), "a run was begun");
    run.errors
}

#[test]
fn weights_that_are_damaged_or_of_another_model_are_refused_by_name() {
    type Damage = fn(&Path);
    let cases: [(&str, Damage, &[&str]); 10] = [
        ("no folder", |at| fs::remove_dir_all(at).unwrap(), &["gpt2", "check the path"]),
        ("no weights", |at| fs::remove_file(at.join("model.safetensors")).unwrap(), &["has neither"]),
        ("no configuration", |at| fs::remove_file(at.join("config.json")).unwrap(), &["config.json"]),
        ("a header that lies", lie, &["model.safetensors: announces a header of"]),
        ("cut short", cut, &["model.safetensors: describes", "is followed by"]),
        (
            "another tensor",
            |at| edit(&at.join("model.safetensors"), "h.1.ln_2.bias", "h.1.ln_3.bias"),
            &["transformer.h.1.ln_3.bias, which the model has not"],
        ),
        (
            "another width",
            |at| edit(&at.join("config.json"), r#""n_embd": 8"#, r#""n_embd": 16"#),
            &["config.json: n_embd is 16, model.dim is 8"],
        ),
        (
            "another shape",
            |at| edit(&at.join("model.safetensors"), "[8,24]", "[24,8]"),
            &["model.safetensors: its transformer.h.", "has shape [24, 8], the model's has [8, 24]"],
        ),
        (
            "another activation",
            |at| edit(&at.join("config.json"), "gelu_new", "relu"),
            &["config.json: activation_function is \"relu\""],
        ),
        (
            "an index that names a missing file",
            |at| {
                fs::remove_file(at.join("model.safetensors")).unwrap();
                let index = r#"{"weight_map": {"wte.weight": "model-00001-of-00002.safetensors"}}"#;
                fs::write(at.join("model.safetensors.index.json"), index).unwrap();
            },
            &["model.safetensors.index.json: it names model-00001-of-00002.safetensors, which is not there"],
        ),
    ];
    for (what, damage, said) in cases {
        let message = refusal(damage);
        for part in said {
            assert!(message.contains(part), "{what}: {message}\nwhere expected was: {part}");
        }
    }
}

fn lie(at: &Path) {
    let file = at.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    bytes[..8].copy_from_slice(&(u64::MAX / 2).to_le_bytes());
    fs::write(file, bytes).unwrap();
}

fn cut(at: &Path) {
    let file = at.join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    fs::write(file, &bytes[..bytes.len() - 1000]).unwrap();
}

#[test]
fn a_recipe_of_another_shape_names_the_key_and_both_values() {
    let bench = Bench::new();
    let init = format!("model.init={}", golden("").display());
    for (set, said) in [
        ("model.dim=32", "n_embd is 8, model.dim is 32"),
        ("model.layers=3", "n_layer is 2, model.layers is 3"),
        ("model.heads=1", "n_head is 2, model.heads is 1"),
        ("model.context=24", "n_positions is 16, model.context is 24"),
        ("model.tied=false", "tie_word_embeddings is true, model.tied is false"),
    ] {
        let sets = [&["checkpoint", "init", "recipe.toml", "--out", "initial"], &SHAPE[..]].concat();
        let output = run(&bench, &[&sets[..], &["--set", &init, "--set", set]].concat());
        assert_eq!(output.status.code(), Some(2));
        assert!(errors(&output).contains(said), "{}", errors(&output));
        assert!(errors(&output).contains("init: "), "{}", errors(&output));
    }
}

#[test]
fn text_is_drawn_from_what_transformers_saved() {
    let bench = Bench::new();
    let folder = copy(&bench, "gpt2");
    let set = [&SHAPE[..], &["--set", "model.init=gpt2"]].concat();
    let output =
        run(&bench, &[&["checkpoint", "init", "recipe.toml", "--out", "initial"], &set[..]].concat());
    assert!(output.status.success(), "{}", errors(&output));
    let generate = |from: &str| {
        let drawn = ["--prompt", "the ring ", "--tokens", "20", "--seed", "5"];
        run(&bench, &[&["generate", "--checkpoint", from], &drawn[..]].concat())
    };
    let without = generate("gpt2");
    assert_eq!(without.status.code(), Some(2));
    assert!(errors(&without).contains("gpt2/tokenizer.json: it is not there"), "{}", errors(&without));
    let saved = bench.path("initial/step-00000000/tokenizer.json");
    fs::copy(saved, folder.join("tokenizer.json")).unwrap();
    let theirs = generate("gpt2");
    assert!(theirs.status.success(), "{}", errors(&theirs));
    assert!(theirs.stdout.starts_with(b"the ring "));
    assert_eq!(theirs.stdout, generate("initial").stdout);
}

#[test]
fn weights_that_are_refused_cost_a_run_that_is_there_nothing() {
    let bench = Bench::new();
    let folder = copy(&bench, "gpt2");
    let train = |more: &[&str]| bench.train("run", &[&SHAPE[..], &["--set", "train.steps=2"], more].concat());
    let before = train(&[]).done();
    lie(&folder);
    let refused = train(&["--overwrite", "--set", "model.init=gpt2"]);
    assert_eq!(refused.code, Some(2), "{}", refused.errors);
    assert!(refused.errors.contains("model.safetensors: announces a header of"), "{}", refused.errors);
    let verified = run(&bench, &["checkpoint", "verify", "run/checkpoints"]);
    assert!(verified.status.success(), "{}", errors(&verified));
    assert_eq!(before.steps().len(), 2);
}

#[test]
fn a_run_has_the_hash_of_its_weights_and_takes_no_others() {
    let bench = Bench::new();
    let folder = copy(&bench, "gpt2");
    let set = [&SHAPE[..], &["--set", "model.init=gpt2", "--set", "train.steps=2"]].concat();
    let first = bench.train("run", &set).done();
    let recipe = run(&bench, &["recipe", "show", "run/recipe.toml"]);
    let recipe = String::from_utf8(recipe.stdout).unwrap();
    let hash = blake3::hash(&fs::read(golden("model.safetensors")).unwrap()).to_hex().to_string();
    assert!(recipe.contains(&hash), "{recipe}");

    flip_last_bit(&folder.join("model.safetensors"));
    let init = ["checkpoint", "init", "run/recipe.toml", "--out", "initial"];
    let refused = run(&bench, &init);
    assert_eq!(refused.status.code(), Some(2));
    assert!(errors(&refused).contains(&format!("model.init_hash is {hash}")), "{}", errors(&refused));
    let other = bench.train("other", &set).done();
    assert_ne!(first.hash(), other.hash());
}

#[test]
fn a_worker_whose_files_differ_is_no_part_of_a_run() {
    let bench = Bench::new();
    for host in ["a", "b"] {
        fs::create_dir(bench.path(host)).unwrap();
        copy(&bench, &format!("{host}/gpt2"));
    }
    flip_last_bit(&bench.path("b/gpt2/model.safetensors"));
    // What every process finds elsewhere, as two hosts may a folder of one name; without buddies nothing else would tell.
    bench.write(
        "hosts.toml",
        "extends = \"recipe.toml\"\n[model]\ndim = 8\ncontext = 16\ninit = \"/proc/self/cwd/gpt2\"\n[parallel]\n\
         shard = \"full\"\nbuddies = false\n",
    );
    let mut coordinator = bench.command();
    coordinator.current_dir(bench.path("a")).stdin(Stdio::piped()).stdout(Stdio::null());
    let coordinator =
        coordinator.args(["coordinator", "../hosts.toml", "--out", "../run", "--token-file", "../token"]);
    let mut coordinator = coordinator.spawn().unwrap();
    let until = Instant::now() + LONG;
    while fs::read(bench.path("token")).is_ok_and(|token| token.is_empty()) || !bench.path("token").exists() {
        assert!(Instant::now() < until, "no coordinator");
        assert_eq!(coordinator.try_wait().unwrap(), None, "the coordinator ended");
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut worker = bench.command();
    let worker =
        worker.current_dir(bench.path("b")).args(["worker", "--token-file", "../token", "--device", "cpu"]);
    let worker = worker.output().unwrap();
    coordinator.kill().unwrap();
    coordinator.wait().unwrap();
    assert!(!worker.status.success());
    let said = errors(&worker);
    assert!(
        said.contains("/gpt2: the BLAKE3 of its weights is") && said.contains("differ between hosts"),
        "{said}"
    );
}

/// As a file may differ between hosts.
fn flip_last_bit(file: &Path) {
    let mut bytes = fs::read(file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(file, bytes).unwrap();
}

#[test]
fn a_configuration_that_no_memory_holds_is_refused() {
    let bench = Bench::new();
    let folder = copy(&bench, "gpt2");
    edit(&folder.join("config.json"), r#""n_layer": 2"#, r#""n_layer": 900000000000"#);
    let output = run(&bench, &["checkpoint", "logits", "gpt2", "--tokens", "1,2"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(errors(&output).contains("gpt2/config.json: it tells of at least"), "{}", errors(&output));
}

#[test]
fn tokens_that_do_not_fit_are_refused() {
    let bench = Bench::new();
    let folder = golden("");
    for (tokens, said) in [
        ("1", "1 tokens where 2 to 16 fit"),
        ("1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17", "17 tokens where 2 to 16 fit"),
        ("1,256", "token 256 is beyond the 256"),
    ] {
        let output = run(&bench, &["checkpoint", "logits", folder.to_str().unwrap(), "--tokens", tokens]);
        assert_eq!(output.status.code(), Some(2));
        assert!(errors(&output).contains(said), "{}", errors(&output));
    }
}
