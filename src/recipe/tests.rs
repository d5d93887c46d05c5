//! Recipes that are understood, and what is said of those that are not.

use std::fs;
use std::path::Path;
use std::time::Duration;

use mattock_worker::plan::{Bits, NonFinite, Parallel, Schedule, Shard, Sum};
use proptest::prelude::*;
use serde::Deserialize;
use tempfile::TempDir;

use super::{Origin, RecipeError, Resolved};

/// The example of the contract, without the comments.
const QUICKSTART: &str = r#"name = "quickstart"
seed = 42

[model]
family = "gpt"
layers = 4
heads = 4
dim = 128
context = 128

[data]
text = ["$CARGO_HOME/registry/src/*/tokio-1.54.1/src/**/*.rs"]
tokenizer = { kind = "bpe", vocab = 512 }
held_out = 0.01

[batch]
size = 32
micro = 4

[optimizer]
name = "adamw"
lr = 1e-3
betas = [0.9, 0.95]
weight_decay = 0.1
clip = 1.0
schedule = { kind = "cosine", warmup = 50, final = 0.1 }

[train]
steps = 400

[reduce]
sum = "exact"
bits = 32
nonfinite = "stop"

[checkpoint]
to = "{out}/checkpoints"
every = 100
keep = 3

[elastic]
min_workers = 1
max_workers = 8
timeout = "10s"
"#;

/// The least that a recipe must say.
const LEAST: &str = "name = \"least\"\nmodel.family = \"gpt\"\nbatch = { size = 8, micro = 2 \
    }\noptimizer.lr = 1e-3\ntrain.steps = 10\n";

fn parse(text: &str) -> Result<Resolved, RecipeError> {
    Resolved::parse(text, Path::new("run.toml"))
}

/// The message that a recipe is refused with.
fn refusal(text: &str) -> String {
    parse(text).expect_err("must be refused").to_string()
}

/// The quickstart recipe with one line written otherwise.
fn with(line: &str, instead: &str) -> String {
    assert!(QUICKSTART.contains(line), "no line {line:?} to replace");
    QUICKSTART.replace(line, instead)
}

fn folder(files: &[(&str, &str)]) -> TempDir {
    let folder = TempDir::new().unwrap();
    for (name, text) in files {
        fs::create_dir_all(folder.path().join(name).parent().unwrap()).unwrap();
        fs::write(folder.path().join(name), text).unwrap();
    }
    folder
}

fn load(folder: &TempDir, sets: &[&str]) -> Result<Resolved, RecipeError> {
    let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
    Resolved::load(&folder.path().join("run.toml"), &sets)
}

#[test]
fn the_contract_becomes_a_plan() {
    let recipe = parse(QUICKSTART).unwrap();
    let plan = &recipe.plan;
    assert_eq!((plan.name.as_str(), plan.seed, plan.steps), ("quickstart", 42, 400));
    assert_eq!(plan.batch.micro_batches(), 8);
    assert_eq!(plan.optimizer.lr, 1e-3);
    assert_eq!(plan.optimizer.clip, Some(1.0));
    assert_eq!(plan.optimizer.schedule, Schedule::Cosine { warmup: 50, last: 0.1 });
    assert_eq!((plan.reduce.sum, plan.reduce.nonfinite), (Sum::Exact, NonFinite::Stop));
    assert_eq!(plan.reduce.bits, Bits::B32);
    assert_eq!(plan.checkpoint.to, "{out}/checkpoints");
    assert_eq!(plan.parallel, Parallel { shard: Shard::None, buddies: true });
    assert_eq!((plan.checkpoint.keep_every, plan.checkpoint.memory), (1000, 64 << 20));
    assert_eq!((plan.elastic.max_workers, plan.elastic.timeout), (8, Duration::from_secs(10)));
    assert_eq!(recipe.family(), "gpt");
    assert_eq!(plan.model["dim"], 128);
    assert_eq!(plan.data["tokenizer"]["vocab"], 512);
}

#[test]
fn what_nobody_wrote_gets_a_default_that_is_shown_as_one() {
    let recipe = parse(LEAST).unwrap();
    assert_eq!(recipe.plan.optimizer.eps, 1e-8);
    assert_eq!(recipe.plan.optimizer.clip, None);
    assert_eq!(recipe.origins["optimizer.eps"], Origin::Default);
    assert_eq!(recipe.origins["optimizer.lr"].to_string(), "run.toml:4");
    assert!(recipe.text.contains("# default"), "{}", recipe.text);
}

#[test]
fn an_unknown_key_is_named_with_its_line_and_the_nearest() {
    for (line, instead, key, nearest) in [
        ("steps = 400", "stpes = 400", "train.stpes", "train.steps"),
        ("lr = 1e-3", "learning_rate = 1e-3", "optimizer.learning_rate", "optimizer.lr"),
        ("seed = 42", "sede = 42", "sede", "seed"),
        ("[elastic]", "[elastik]", "elastik.max_workers", "elastic.max_workers"),
        ("seed = 42", "workers = 2", "workers", "elastic.max_workers"),
        ("warmup = 50", "warm_up = 50", "optimizer.schedule.warm_up", "optimizer.schedule.warmup"),
        ("seed = 42", "steps = 42", "steps", "train.steps"),
    ] {
        let text = with(line, instead);
        let at = 1 + text.lines().position(|line| line.contains(key.rsplit('.').next().unwrap())).unwrap();
        let message = refusal(&text);
        assert_eq!(message, format!("run.toml:{at}: unknown key `{key}`; the nearest is `{nearest}`"));
    }
}

#[test]
fn a_value_of_the_wrong_type_is_named_with_what_would_do() {
    for (line, instead, said) in [
        (
            "steps = 400",
            "steps = \"400\"",
            "run.toml:29: `train.steps` is a text (\"400\"), expected a whole number",
        ),
        (
            "size = 32",
            "size = 3.5",
            "`batch.size` is a number with a fraction (3.5), expected a whole number",
        ),
        ("lr = 1e-3", "lr = \"fast\"", "`optimizer.lr` is a text (\"fast\"), expected a number above 0"),
        (
            "[elastic]",
            "[parallel]\nbuddies = \"yes\"\n[elastic]",
            "`parallel.buddies` is a text (\"yes\"), expected true or false",
        ),
        ("timeout = \"10s\"", "timeout = 10", "`elastic.timeout` is a whole number (10), expected a text"),
        ("[train]\nsteps = 400", "[train.steps]\nx = 1", "unknown key `train.steps.x`"),
        ("[train]\nsteps = 400", "[train.steps]", "`train.steps` is a table"),
    ] {
        let message = refusal(&with(line, instead));
        assert!(message.contains(said), "{message}");
    }
    assert!(
        refusal(&format!("train = 3\n{}", with("[train]\nsteps = 400", "")))
            .contains("`train` is a whole number (3), expected a table")
    );
    assert!(refusal(&format!("data = 3\n{LEAST}")).contains("`data` is 3, expected a table"));
}

#[test]
fn a_value_out_of_range_is_refused() {
    for (line, instead, said) in [
        ("seed = 42", "seed = -1", "`seed` is -1, expected 0 or more"),
        ("seed = 42", "seed = 99999999999999999999", "`seed` does not fit in 64 bits"),
        ("steps = 400", "steps = 0", "`train.steps` is 0, expected 1 or more"),
        ("keep = 3", "keep = 0", "`checkpoint.keep` is 0"),
        ("lr = 1e-3", "lr = nan", "`optimizer.lr` is NaN, expected a number above 0"),
        ("betas = [0.9, 0.95]", "betas = [0.9, 1.0]", "each at least 0 and below 1"),
        ("betas = [0.9, 0.95]", "betas = [0.9]", "expected two numbers"),
        ("final = 0.1", "final = 2", "expected a factor between 0 and 1"),
        (
            "sum = \"exact\"",
            "sum = \"exakt\"",
            "expected \"exact\", \"exact64\", \"f32\", \"bf16\"; the nearest is \"exact\"",
        ),
        ("name = \"adamw\"", "name = \"sgd\"", "`optimizer.name` is \"sgd\", expected \"adamw\""),
        ("timeout = \"10s\"", "timeout = \"10\"", "a length of time with its unit"),
        ("timeout = \"10s\"", "timeout = \"1ms\"", "from \"100ms\" to \"1h\""),
        ("name = \"quickstart\"", "name = \"../x\"", "names a folder"),
        ("to = \"{out}/checkpoints\"", "to = \"\"", "`checkpoint.to` is empty"),
        ("keep = 3", "keep_every = -1", "`checkpoint.keep_every` is -1"),
        ("keep = 3", "memory = \"64\"", "an amount of memory with its unit"),
        ("keep = 3", "memory = \"8MiB\"", "from \"16MiB\" to \"64GiB\""),
        ("keep = 3", "memory = \"-1GiB\"", "an amount of memory"),
        ("dim = 128", "dim = nan", "run.toml:8: `model.dim` is nan, expected finite numbers only"),
    ] {
        let message = refusal(&with(line, instead));
        assert!(message.contains(said), "{message}");
    }
}

#[test]
fn values_at_odds_with_each_other_are_refused_with_what_would_do() {
    for (line, instead, said) in [
        (
            "micro = 4",
            "micro = 5",
            "`batch.size` is 32, which micro-batches of 5 do not divide: 30 or 35 would do, or \
                `batch.micro` = 4 or 8",
        ),
        ("micro = 4", "micro = 64", "64 would do, or `batch.micro` = 32"),
        ("warmup = 50", "warmup = 401", "`optimizer.schedule.warmup` is 401, more than the 400 steps"),
        ("kind = \"cosine\"", "kind = \"constant\"", "`optimizer.schedule.final` says where a cosine ends"),
        ("bits = 32", "bits = 20", "`reduce.bits` is 20, expected 8, 12, 16, 24, 32 or \"auto\""),
        ("bits = 32", "bits = -8", "`reduce.bits` is -8, expected 8, 12, 16, 24, 32 or \"auto\""),
        (
            "min_workers = 1",
            "min_workers = 9",
            "`elastic.min_workers` is 9, more than `elastic.max_workers`, which is 8",
        ),
    ] {
        let message = refusal(&with(line, instead));
        assert!(message.contains(said), "{message}");
    }
}

#[test]
fn bits_are_for_exact_sums_of_no_more_micro_batches_than_they_hold() {
    let short = with("bits = 32", "bits = 8");
    assert_eq!(parse(&short).unwrap().plan.reduce.bits, Bits::B8);
    let message = refusal(&short.replace("sum = \"exact\"", "sum = \"f32\""));
    assert!(message.contains("`reduce.bits` is 8, but `reduce.sum` adds floats"), "{message}");
    let chosen = short.replace("bits = 8", "bits = \"auto\"");
    let reduce = parse(&chosen).unwrap().plan.reduce;
    assert!(reduce.auto && reduce.bits == Bits::B32 && !parse(&short).unwrap().plan.reduce.auto);
    let message = refusal(&chosen.replace("sum = \"exact\"", "sum = \"bf16\""));
    assert!(message.contains("`reduce.bits` is \"auto\", but `reduce.sum` adds floats"), "{message}");
    let message = refusal(&short.replace("bits = 8", "bits = \"fast\""));
    assert!(
        message.contains("`reduce.bits` is \"fast\", expected 8, 12, 16, 24, 32 or \"auto\""),
        "{message}"
    );
    let of = |size: &str| short.replace("size = 32", size);
    assert_eq!(parse(&of("size = 128")).unwrap().plan.batch.micro_batches(), 32);
    let message = refusal(&of("size = 132"));
    assert!(
        message.contains("too few for the sum of 33 micro-batches") && message.contains("32 of them"),
        "{message}"
    );
}

#[test]
fn a_missing_key_is_named_with_what_it_is_for() {
    assert_eq!(
        refusal(&with("steps = 400", "")),
        "run.toml: `train.steps` is missing (steps of the whole run)"
    );
    assert!(refusal("").contains("`name` is missing"));
}

#[test]
fn what_is_not_toml_is_refused_with_its_line() {
    let message = refusal("name = \"a\"\nseed = = 3\n");
    assert!(message.starts_with("run.toml:2: not valid TOML"), "{message}");
}

#[test]
fn a_missing_recipe_is_named() {
    let missing = Resolved::load(Path::new("nowhere/run.toml"), &[]).unwrap_err().to_string();
    assert!(missing.starts_with("cannot read the recipe nowhere/run.toml"), "{missing}");
}

#[test]
fn set_wins_over_the_recipe_and_the_recipe_over_its_base() {
    let files = [
        ("base/base.toml", QUICKSTART),
        ("run.toml", "extends = \"base/base.toml\"\nname = \"run\"\n[train]\nsteps = 200\n"),
    ];
    let folder = folder(&files);
    let recipe =
        load(&folder, &["train.steps=300", "reduce.sum=exact64", "optimizer.schedule.warmup=7"]).unwrap();
    assert_eq!((recipe.plan.name.as_str(), recipe.plan.steps, recipe.plan.seed), ("run", 300, 42));
    assert_eq!(recipe.plan.reduce.sum, Sum::Exact64);
    assert_eq!(recipe.plan.optimizer.schedule, Schedule::Cosine { warmup: 7, last: 0.1 });
    assert_eq!(recipe.origins["train.steps"], Origin::Set);
    assert!(recipe.origins["name"].to_string().ends_with("run.toml:2"));
    assert!(recipe.origins["seed"].to_string().ends_with("base.toml:2"));
}

#[test]
fn a_table_written_inline_replaces_the_one_below() {
    let folder = folder(&[
        ("base.toml", QUICKSTART),
        ("run.toml", "extends = \"base.toml\"\ndata.tokenizer = { kind = \"bytes\" }\n"),
    ]);
    let tokenizer = |sets: &[&str]| load(&folder, sets).unwrap().plan.data["tokenizer"].clone();
    assert_eq!(tokenizer(&[]), serde_json::json!({ "kind": "bytes" }));
    assert_eq!(
        tokenizer(&["data.tokenizer={ kind = \"bpe\", vocab = 9 }"]),
        serde_json::json!({ "kind": "bpe", "vocab": 9 })
    );
}

#[test]
fn a_recipe_that_extends_itself_is_refused() {
    let folder =
        folder(&[("base.toml", "extends = \"run.toml\""), ("run.toml", "\nextends = \"base.toml\"")]);
    let message = load(&folder, &[]).unwrap_err().to_string();
    assert!(
        message.contains("base.toml:1: `extends` comes back to") && message.contains("run.toml"),
        "{message}"
    );
}

#[test]
fn a_set_that_is_no_assignment_is_refused() {
    let folder = folder(&[("run.toml", QUICKSTART)]);
    for (argument, said) in [
        ("train.steps", "write key=value"),
        ("=3", "names joined by dots"),
        ("a..b=3", "names joined by dots"),
        ("extends=base.toml", "can only be written in a recipe"),
        ("train.stepz=3", "--set: unknown key `train.stepz`; the nearest is `train.steps`"),
        ("train.steps=many", "--set: `train.steps` is a text (\"many\"), expected a whole number"),
        ("train.steps=1\nseed=2", "expected a whole number"),
    ] {
        let message = load(&folder, &[argument]).unwrap_err().to_string();
        assert!(message.contains(said), "{message}");
    }
}

#[test]
fn paths_are_absolute_from_the_recipe_that_wrote_them() {
    let base = "[data]\ntext = [\"a/*.rs\", \"/b/*.rs\", \"$CARGO_HOME/c\", \"~/d\"]\ntokenizer = { \
        file = \"t.json\" }\n[checkpoint]\nto = \"kept\"\n";
    let folder =
        folder(&[("deep/base.toml", base), ("run.toml", &format!("extends = \"deep/base.toml\"\n{LEAST}"))]);
    let root = folder.path().to_str().unwrap();
    let plan = load(&folder, &[]).unwrap().plan;
    assert_eq!(
        plan.data["text"],
        serde_json::json!([format!("{root}/deep/a/*.rs"), "/b/*.rs", "$CARGO_HOME/c", "~/d"])
    );
    assert_eq!(plan.data["tokenizer"]["file"], format!("{root}/deep/t.json"));
    assert_eq!(plan.checkpoint.to, format!("{root}/deep/kept"));
    let plan = load(&folder, &["data.text=[\"x\"]", "checkpoint.to=s3://bucket/prefix"]).unwrap().plan;
    assert_eq!(plan.data["text"], serde_json::json!([format!("{root}/x")]));
    assert_eq!(plan.checkpoint.to, "s3://bucket/prefix");
}

#[test]
fn a_wrong_key_of_the_task_reads_like_any_other() {
    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "lowercase")]
    enum Family {
        Gpt,
    }
    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only its errors matter")]
    struct Model {
        family: Family,
        layers: u32,
        heads: u32,
        dim: u32,
        context: u32,
    }
    for (line, instead, said) in [
        ("layers = 4", "layer = 4", "run.toml:6: unknown key `model.layer`; the nearest is `layers`"),
        ("dim = 128", "dim = \"wide\"", "run.toml:8: `model.dim` is \"wide\", expected u32"),
        ("dim = 128", "dim = -1", "run.toml:8: `model.dim` is -1, expected u32"),
        ("dim = 128", "dim = 1.5", "run.toml:8: `model.dim` is 1.5, expected u32"),
        ("dim = 128", "", "[model]: missing field `dim`"),
        (
            "family = \"gpt\"",
            "family = \"gtp\"",
            "run.toml:5: `model.family` is \"gtp\", expected \"gpt\"; the nearest is \"gpt\"",
        ),
    ] {
        let recipe = parse(&with(line, instead)).unwrap();
        let error = serde_json::from_value::<Model>(recipe.plan.model.clone().into()).unwrap_err();
        let message = recipe.table_error("model", &error).to_string();
        assert!(message.contains(said), "{message}");
    }
}

#[test]
fn the_resolved_text_says_the_same_anywhere() {
    let folder =
        folder(&[("base.toml", QUICKSTART), ("run.toml", "extends = \"base.toml\"\nname = \"run\"\n")]);
    let recipe = load(&folder, &["model.dropout=0.1", "data.text=[\"a\", \"b\"]"]).unwrap();
    assert_eq!(parse(&recipe.text).unwrap().plan, recipe.plan, "{}", recipe.text);
}

#[test]
fn every_recipe_we_ship_is_valid() {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    for entry in fs::read_dir(configs).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            Resolved::load(&path, &[]).unwrap_or_else(|error| panic!("{error}"));
        }
    }
}

/// Values of any TOML type, for a task's table.
fn task_value() -> impl Strategy<Value = toml::Value> {
    let leaf = prop_oneof![
        any::<i64>().prop_map(toml::Value::Integer),
        any::<f64>().prop_filter("finite", |number| number.is_finite()).prop_map(toml::Value::Float),
        any::<bool>().prop_map(toml::Value::Boolean),
        ".{0,12}".prop_map(toml::Value::String),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(toml::Value::Array),
            prop::collection::btree_map(".{0,6}", inner, 0..4)
                .prop_map(|table| toml::Value::Table(table.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn no_text_makes_parsing_panic(text in "(?s).{0,200}") {
        let _ = parse(&text);
    }

    #[test]
    fn no_mangled_recipe_makes_parsing_panic(at in 0..QUICKSTART.len(), cut in 0usize..40, instead in "(?s).{0,8}") {
        let (head, tail) = (&QUICKSTART[..at], &QUICKSTART[(at + cut).min(QUICKSTART.len())..]);
        let _ = parse(&format!("{head}{instead}{tail}"));
    }

    #[test]
    fn resolving_twice_changes_nothing(
        seed in 0..i64::MAX,
        lr in f64::MIN_POSITIVE..f64::MAX,
        micro in 1u32..100,
        count in 1u32..100,
        task in prop::collection::btree_map("[a-z.\" \n=#]{1,8}", task_value(), 0..4),
    ) {
        let mut task: toml::Table = task.into_iter().collect();
        task.insert("family".into(), "any".into());
        let mut whole = toml::Table::new();
        whole.insert("model".into(), task.into());
        let text = format!(
            "name = \"p\"\nseed = {seed}\noptimizer.lr = {lr:e}\ntrain.steps = 1\nbatch = {{ size = {}, \
                micro = {micro} }}\n{whole}",
            micro * count,
        );
        let once = parse(&text).unwrap();
        let twice = parse(&once.text).unwrap_or_else(|error| panic!("{error}\n{}", once.text));
        prop_assert_eq!(&once.plan, &twice.plan);
        prop_assert_eq!(once.plan.optimizer.lr, lr);
    }
}
