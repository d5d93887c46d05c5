//! The command line: what is parsed, what is refused, what help says.

use clap::{Args, CommandFactory};

use super::checkpoint::{CheckpointAction, CheckpointArgs};
use super::coordinator::CoordinatorArgs;
use super::data::{DataAction, DataArgs};
use super::generate::GenerateArgs;
use super::plan::PlanArgs;
use super::recipe::{RecipeAction, RecipeArgs, RecipeFile};
use super::train::TrainArgs;
use super::worker::WorkerArgs;
use super::{Cli, recipe};
use crate::exit::{Exit, Failure};

fn parse<A: Args>(line: &str) -> Result<A, clap::Error> {
    let command = A::augment_args(clap::Command::new("mattock"));
    let words = std::iter::once("mattock").chain(line.split_whitespace());
    A::from_arg_matches(&command.try_get_matches_from(words)?)
}

#[test]
fn the_command_line_is_sound() {
    Cli::command().debug_assert();
    CheckpointArgs::augment_args(clap::Command::new("checkpoint")).debug_assert();
    CoordinatorArgs::augment_args(clap::Command::new("coordinator")).debug_assert();
    DataArgs::augment_args(clap::Command::new("data")).debug_assert();
    GenerateArgs::augment_args(clap::Command::new("generate")).debug_assert();
    PlanArgs::augment_args(clap::Command::new("plan")).debug_assert();
    TrainArgs::augment_args(clap::Command::new("train")).debug_assert();
    WorkerArgs::augment_args(clap::Command::new("worker")).debug_assert();
}

#[test]
fn train_takes_the_flags_of_the_contract() {
    let args: TrainArgs =
        parse("r.toml --workers 3 --device cpu --out d --resume=7 --set a.b=c --set d=e --json").unwrap();
    assert_eq!(args.workers.get(), 3);
    assert_eq!(args.resume, Some(Some(7)));
    assert_eq!(args.recipe.sets, ["a.b=c", "d=e"]);
    assert!(args.json && !args.overwrite);
    let args: TrainArgs = parse("r.toml --out d --resume").unwrap();
    assert_eq!((args.resume, args.workers.get(), args.device.as_str()), (Some(None), 2, "auto"));
    assert!(parse::<TrainArgs>("r.toml --out d --overwrite").unwrap().overwrite);
}

#[test]
fn train_refuses_what_contradicts_itself() {
    for line in ["r.toml --workers 0", "r.toml --out d --resume --overwrite", "", "r.toml --fast"] {
        let error = parse::<TrainArgs>(line).unwrap_err();
        assert_eq!(error.exit_code(), i32::from(Exit::BadInput as u8), "{line}: {error}");
    }
}

#[test]
fn the_other_commands_take_the_flags_of_the_contract() {
    let generate: GenerateArgs = parse("--checkpoint s3://b/p --prompt fn").unwrap();
    assert_eq!((generate.checkpoint.as_str(), generate.prompt.as_str()), ("s3://b/p", "fn"));
    for action in ["ls", "verify", "show"] {
        let args: CheckpointArgs = parse(&format!("{action} file:///x")).unwrap();
        let (CheckpointAction::Ls(at) | CheckpointAction::Verify(at) | CheckpointAction::Show(at)) =
            args.action
        else {
            panic!("{action} is another action");
        };
        assert_eq!(at.url, "file:///x");
    }
    let args: DataArgs = parse("show r.toml").unwrap();
    assert!(matches!(args.action, DataAction::Show(file) if file.recipe.to_str() == Some("r.toml")));
    let args: DataArgs = parse("build r.toml --to file:///x --shard 1MiB").unwrap();
    let DataAction::Build(args) = args.action else { panic!("build is another action") };
    assert_eq!((args.to.as_deref(), args.shard, args.window), (Some("file:///x"), 1 << 20, 16));
    assert!(
        parse::<DataArgs>("build r.toml --window 3").is_err(),
        "nothing is cut where nothing is published"
    );
    parse::<DataArgs>("batches r.toml --steps 3 --out b.npy --set seed=1").unwrap();
    assert!(parse::<DataArgs>("batches r.toml --steps 0 --out b.npy").is_err());
    parse::<CheckpointArgs>("init r.toml --out d").unwrap();
    parse::<CoordinatorArgs>("r.toml --out d --token-file t").unwrap();
    parse::<WorkerArgs>("--coordinator 127.0.0.1:1 --token-file t --device cuda:1").unwrap();
}

#[test]
fn no_command_takes_a_token_on_the_command_line() {
    assert!(parse::<WorkerArgs>("--coordinator 127.0.0.1:1 --token secret").is_err());
}

fn quickstart(action: fn(RecipeFile) -> RecipeAction, sets: &[&str]) -> RecipeArgs {
    let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/quickstart.toml").into();
    RecipeArgs { action: action(RecipeFile { recipe, sets: sets.iter().map(ToString::to_string).collect() }) }
}

#[test]
fn show_prints_each_value_with_its_origin() {
    let mut out = Vec::new();
    let args = quickstart(RecipeAction::Show, &["seed=7"]);
    assert_eq!(recipe::run(&args, |_| Ok(()), &mut out).unwrap(), Exit::Done);
    let text = String::from_utf8(out).unwrap();
    assert!(text.contains("\nseed = 7             # --set\n"), "{text}");
}

#[test]
fn check_ends_with_bad_input_where_the_recipe_or_the_task_refuses() {
    let run = |sets: &[&str], check: fn() -> Result<(), Failure>| {
        recipe::run(&quickstart(RecipeAction::Check, sets), |_| check(), &mut Vec::new())
            .map_err(|failure| failure.exit)
    };
    assert_eq!(run(&[], || Ok(())), Ok(Exit::Done));
    assert_eq!(run(&["batch.micro=5"], || Ok(())), Err(Exit::BadInput));
    assert_eq!(run(&[], || Err(Failure::bad_input(anyhow::anyhow!("no such family")))), Err(Exit::BadInput));
}
