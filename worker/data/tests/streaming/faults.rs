//! What a store may do to an object: what passes is ridden out, what stays is told by name.

use std::fs;

use mattock_data::{DataError, Split};

use crate::set::{CONTEXT, Fault, Set};

/// Reads a sample of shard 0 while the store does this to it so many times.
fn read_through(fault: Fault, times: usize) -> Result<Vec<i32>, DataError> {
    let set = Set::new();
    let stream = set.open();
    set.harm(&set.shard_name(&stream, 0), fault, times);
    let mut tokens = Vec::new();
    stream.window(Split::Train, 0, CONTEXT, &mut tokens)?;
    let mut expected = Vec::new();
    (0..=CONTEXT as u64).for_each(|token| set.token(token, &mut expected));
    assert_eq!(tokens, expected);
    Ok(tokens)
}

#[test]
fn a_shard_that_is_wrong_once_is_fetched_again() {
    for fault in [Fault::Corrupt, Fault::Truncate, Fault::Lengthen, Fault::Missing] {
        read_through(fault, 1).unwrap();
    }
}

#[test]
fn a_shard_that_stays_wrong_is_told_by_name() {
    for (fault, word) in [
        (Fault::Corrupt, "does not have the hash"),
        (Fault::Truncate, "has 2048 bytes where 4096"),
        (Fault::Lengthen, "has more than its 4096 bytes"),
        (Fault::Missing, "is not there"),
    ] {
        let error = read_through(fault, usize::MAX).unwrap_err().to_string();
        let named = error.contains("folder/shards/") && error.contains("publish the dataset again");
        assert!(error.contains(word) && named, "{error}");
    }
}

#[test]
fn a_store_that_is_busy_is_asked_again() {
    read_through(Fault::Busy, 3).unwrap();
    assert!(read_through(Fault::Busy, usize::MAX).unwrap_err().to_string().contains("fails"));
}

#[test]
fn who_asks_after_an_error_is_served_once_the_object_is_sound() {
    let set = Set::new();
    let stream = set.open();
    // Of the first reader both reads; a third is sound.
    set.harm(&set.shard_name(&stream, 0), Fault::Corrupt, 2);
    let mut tokens = Vec::new();
    stream.window(Split::Train, 0, CONTEXT, &mut tokens).unwrap_err();
    stream.window(Split::Train, 0, CONTEXT, &mut tokens).unwrap();
}

#[test]
fn publishing_again_repairs_a_shard() {
    let set = Set::new();
    let stream = set.open();
    let path = set.store_folder().join(set.shard_name(&stream, 0));
    let whole = fs::read(&path).unwrap();
    for harm in [&whole[..100], &[0; 4096][..]] {
        fs::write(&path, harm).unwrap();
        set.publish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), whole);
    }
    fs::remove_file(&path).unwrap();
    set.publish().unwrap();
    assert_eq!(fs::read(&path).unwrap(), whole);
}

#[test]
fn a_damaged_manifest_or_tokenizer_opens_nothing() {
    let set = Set::new();
    for name in ["dataset.json", "tokenizer.json"] {
        set.harm(name, Fault::Corrupt, usize::MAX);
        let error = set.try_open(1 << 30).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
        set.harm(name, Fault::Corrupt, 0);
    }
    set.try_open(1 << 30).unwrap();
}

#[test]
fn a_cached_shard_that_was_damaged_is_fetched_again() {
    let set = Set::new();
    let mut first = Vec::new();
    set.open().window(Split::Train, 0, CONTEXT, &mut first).unwrap();
    let [(path, _)] =
        &set.files().into_iter().filter(|(path, _)| path.extension().is_some()).collect::<Vec<_>>()[..]
    else {
        panic!("one shard is cached: {:?}", set.files());
    };
    for harm in [vec![0; 4096], vec![0; 10]] {
        fs::write(path, harm).unwrap();
        let mut tokens = Vec::new();
        set.open().window(Split::Train, 0, CONTEXT, &mut tokens).unwrap();
        assert_eq!(tokens, first);
    }
    assert_eq!(set.shard_reads(), 3);
}
