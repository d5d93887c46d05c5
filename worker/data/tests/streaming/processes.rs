//! Several processes and one cache: its bound is kept, and a killed process leaves nothing that is taken for whole.
//!
//! A child is this test program, told by its environment to be one.

use std::io::{BufRead, BufReader, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use mattock_data::{ShardStore, Split, StoreFault, Stream};

use crate::set::{CACHE, CONTEXT, FolderStore, MICRO, SIZE, Set};
use crate::wait_until;

const ROLE: &str = "MATTOCK_TEST_CHILD";

/// Starts a child in a role on a set.
fn child(role: &str, set: &Set, seed: u64) -> Child {
    let words = [role.to_owned(), seed.to_string()];
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "processes::a_child", "--nocapture"])
        .env(ROLE, words.join(" "))
        .env("MATTOCK_TEST_STORE", set.store_folder())
        .env("MATTOCK_TEST_CACHE", set.cache_folder())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Not a test, but what children do.
#[test]
fn a_child() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let place = |name: &str| PathBuf::from(std::env::var(name).unwrap());
    let (store, cache) = (FolderStore::new(place("MATTOCK_TEST_STORE")), place("MATTOCK_TEST_CACHE"));
    match role.split_once(' ').unwrap() {
        ("reader", seed) => read_epoch(store, &cache, seed.parse().unwrap()),
        _ => hang(store, &cache),
    }
}

/// Reads an epoch, all of it, in the order of a seed.
fn read_epoch(store: FolderStore, cache: &Path, seed: u64) {
    let stream = Stream::open(Arc::new(store), cache, CACHE).unwrap();
    let order = stream.published().order(seed, CONTEXT, SIZE, MICRO);
    let all: Vec<u32> = (0..SIZE / MICRO).collect();
    let mut tokens = Vec::new();
    for step in 0..order.samples() / u64::from(SIZE) {
        stream.follow(&order, step, &all, MICRO);
        for position in step * u64::from(SIZE)..(step + 1) * u64::from(SIZE) {
            tokens.clear();
            stream.window(Split::Train, order.sample(position), CONTEXT, &mut tokens).unwrap();
        }
    }
}

/// A store that stops in the middle of each shard.
struct Stuck(FolderStore);

impl ShardStore for Stuck {
    fn read(&self, name: &str, take: &mut dyn FnMut(&[u8]) -> ControlFlow<()>) -> Result<(), StoreFault> {
        if !name.starts_with("shards/") {
            return self.0.read(name, take);
        }
        self.0.read(name, &mut |bytes| {
            let _ = take(bytes);
            println!("\nin the middle");
            std::io::stdout().flush().unwrap();
            loop {
                std::thread::park();
            }
        })
    }

    fn size(&self, name: &str) -> Result<Option<u64>, StoreFault> {
        self.0.size(name)
    }

    fn put(&self, name: &str, bytes: Vec<u8>) -> Result<(), StoreFault> {
        self.0.put(name, bytes)
    }

    fn create(&self, name: &str, bytes: Vec<u8>) -> Result<bool, StoreFault> {
        self.0.create(name, bytes)
    }

    fn url(&self, name: &str) -> String {
        self.0.url(name)
    }
}

fn hang(store: FolderStore, cache: &Path) {
    let stream = Stream::open(Arc::new(Stuck(store)), cache, CACHE).unwrap();
    let _ = stream.window(Split::Train, 0, CONTEXT, &mut Vec::new());
}

#[test]
fn processes_in_one_order_keep_the_bound_together() {
    let set = Set::new();
    let mut children = [(); 3].map(|()| child("reader", &set, 1));
    let (mut most, looking) = (0, set.open());
    wait_until("all children have read all", || {
        most = most.max(looking.cached_bytes().unwrap());
        assert!(most <= CACHE, "the cache holds {most} bytes of {CACHE}");
        children.iter_mut().all(|child| child.try_wait().unwrap().is_some())
    });
    assert!(children.iter_mut().all(|child| child.wait().unwrap().success()));
    assert!(most > CACHE / 2, "a cache that is never used keeps any bound: {most}");
}

#[test]
fn a_process_that_is_killed_while_it_fetches_leaves_nothing_half() {
    let set = Set::new();
    let mut killed = child("stuck", &set, 0);
    let lines = BufReader::new(killed.stdout.take().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line == "in the middle"));
    killed.kill().unwrap();
    killed.wait().unwrap();
    let named = |extension: &str| {
        let files = set.files();
        files.into_iter().filter(|(path, _)| path.extension().is_some_and(|of| of == extension)).count()
    };
    assert_eq!((named("part"), named("shard")), (1, 0));

    let stream = set.open();
    let (mut tokens, mut expected) = (Vec::new(), Vec::new());
    stream.window(Split::Train, 0, CONTEXT, &mut tokens).unwrap();
    (0..=CONTEXT as u64).for_each(|token| set.token(token, &mut expected));
    assert_eq!(tokens, expected);
    assert_eq!((named("part"), named("shard")), (0, 1));
}
