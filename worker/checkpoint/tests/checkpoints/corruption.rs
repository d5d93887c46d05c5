//! Damage after the fact: it is noticed, named, and the checkpoint before is used.

use std::sync::Arc;

use mattock_checkpoint::{Flaw, Layout, LoadError, Location, Unusable, Which, load, show, verify};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};

use crate::samples::{assert_is, keep, layout, must_save};

const PIECES: [&str; 7] = [
    "manifest.json",
    "config.json",
    "tokenizer.json",
    "recipe.toml",
    "exponents.bin",
    "model.safetensors",
    "optimizer.safetensors",
];

/// A store with complete checkpoints of steps 1 and 2.
fn two_checkpoints() -> (Arc<InMemory>, Location) {
    let store = Arc::new(InMemory::new());
    let location = Location::given("memory://given", Arc::clone(&store) as Arc<dyn ObjectStore>);
    must_save(&location, 1, keep(3));
    must_save(&location, 2, keep(3));
    (store, location)
}

/// Changes a piece of step 2; `None` removes it.
fn damage(store: &InMemory, piece: &str, change: impl FnOnce(Vec<u8>) -> Option<Vec<u8>>) {
    damage_step(store, 2, piece, change);
}

#[tokio::main(flavor = "current_thread")]
async fn damage_step(
    store: &InMemory,
    step: u64,
    piece: &str,
    change: impl FnOnce(Vec<u8>) -> Option<Vec<u8>>,
) {
    let path = Path::from(format!("step-{step:08}/{piece}"));
    let whole = store.get(&path).await.unwrap().bytes().await.unwrap();
    match change(whole.to_vec()) {
        Some(changed) => _ = store.put(&path, changed.into()).await.unwrap(),
        None => store.delete(&path).await.unwrap(),
    }
}

/// The newest that loads is step 1, and step 2 is told to be skipped because of that piece.
fn assert_falls_back(location: &Location, piece: &str) -> Unusable {
    let (loaded, mut skipped) = load(location, Which::Newest, &layout()).unwrap();
    assert_is(&loaded, 1);
    let skipped = skipped.pop().expect("it is said that step 2 was skipped");
    assert!(skipped.step == 2 && skipped.to_string().contains(piece), "{skipped}");
    let explicit = load(location, Which::Step(2), &layout()).unwrap_err();
    assert!(matches!(&explicit, LoadError::Bad { newest_good: Some(1), .. }), "{explicit}");
    assert!(explicit.to_string().contains(piece), "{explicit}");
    let verdicts = verify(location, None).unwrap();
    assert_eq!(verdicts.iter().map(|v| (v.step, v.flaws.len())).collect::<Vec<_>>(), [(2, 1), (1, 0)]);
    skipped
}

#[test]
fn a_flipped_bit_in_any_piece_is_noticed_and_named() {
    for piece in PIECES {
        for at in [0.0, 0.3, 0.99] {
            let (store, location) = two_checkpoints();
            damage(&store, piece, |mut bytes| {
                let at = (bytes.len() as f64 * at) as usize;
                bytes[at] ^= 0x10;
                Some(bytes)
            });
            assert_falls_back(&location, piece);
        }
    }
}

#[test]
fn a_piece_that_was_cut_short_or_grew_is_noticed_and_named() {
    for piece in PIECES {
        for change in [|bytes: Vec<u8>| bytes[..bytes.len() - 1].to_vec(), |bytes| [bytes, vec![0]].concat()]
        {
            let (store, location) = two_checkpoints();
            damage(&store, piece, |bytes| Some(change(bytes)));
            assert_falls_back(&location, piece);
        }
    }
}

#[test]
fn a_missing_piece_is_noticed_and_named() {
    for piece in PIECES {
        let (store, location) = two_checkpoints();
        damage(&store, piece, |_| None);
        assert_falls_back(&location, piece);
    }
}

#[test]
fn a_manifest_of_another_step_is_not_believed() {
    let (store, location) = two_checkpoints();
    let other = manifest_of_step_1(&store);
    damage(&store, "manifest.json", |_| Some(other));
    assert_eq!(assert_falls_back(&location, "manifest.json").flaw, Flaw::OtherStep { step: 1 });
}

#[test]
fn saving_a_damaged_step_again_mends_it() {
    for piece in PIECES {
        let (store, location) = two_checkpoints();
        damage(&store, piece, |mut bytes| {
            bytes[1] ^= 1;
            Some(bytes)
        });
        must_save(&location, 2, keep(3));
        let (loaded, skipped) = load(&location, Which::Newest, &layout()).unwrap();
        assert_is(&loaded, 2);
        assert_eq!(skipped, []);
    }
}

#[test]
fn when_all_are_damaged_each_is_named() {
    let (store, location) = two_checkpoints();
    damage(&store, "model.safetensors", |_| None);
    damage_step(&store, 1, "exponents.bin", |_| None);
    let error = load(&location, Which::Newest, &layout()).unwrap_err().to_string();
    assert!(error.contains("model.safetensors") && error.contains("exponents.bin"), "{error}");
}

/// Another model is an error, not a reason to take an older checkpoint.
#[test]
fn a_checkpoint_of_another_model_is_refused_by_its_first_difference() {
    let (_, location) = two_checkpoints();
    let mut tensors = layout().tensors().to_vec();
    tensors[2].shape = vec![2, 4];
    let error = load(&location, Which::Newest, &Layout::new(tensors.clone(), 48).unwrap()).unwrap_err();
    assert!(matches!(error, LoadError::OtherModel { .. }));
    assert!(error.to_string().contains("h.0.mlp has shape [2, 2, 2], wanted is [2, 4]"), "{error}");
    tensors[2].name = "h.0.attn".into();
    let error = load(&location, Which::Step(1), &Layout::new(tensors, 48).unwrap()).unwrap_err();
    assert!(error.to_string().contains("no tensor h.0.attn"), "{error}");
}

#[test]
fn the_same_tensors_elsewhere_in_the_flat_space_are_another_model() {
    let (_, location) = two_checkpoints();
    let larger = Layout::new(layout().tensors().to_vec(), 64).unwrap();
    assert!(matches!(load(&location, Which::Newest, &larger), Err(LoadError::OtherModel { .. })));
}

/// Falling back from what a newer program wrote would lose its work without need.
#[test]
fn a_checkpoint_of_a_newer_program_is_refused_and_not_skipped() {
    let (store, location) = two_checkpoints();
    damage(&store, "manifest.json", |bytes| {
        let text = String::from_utf8(bytes).unwrap().replace("\"format\": 2", "\"format\": 3");
        let (open, _) = text.split_once(",\n  \"check\"").unwrap();
        let check = blake3::hash(open.as_bytes()).to_hex();
        Some(format!("{open},\n  \"check\": \"{check}\"\n}}\n").into_bytes())
    });
    let error = show(&location, Which::Newest).unwrap_err();
    assert!(matches!(error, LoadError::TooNew { format: 3, .. }), "{error}");
    assert_is(&load(&location, Which::Step(1), &layout()).unwrap().0, 1);
}

/// Format 1 had neither hashes of chunks nor what pieces hold.
#[test]
fn what_an_earlier_program_wrote_is_read() {
    let (store, location) = two_checkpoints();
    damage(&store, "manifest.json", |bytes| {
        let text = String::from_utf8(bytes).unwrap();
        let (open, _) = text.split_once(",\n  \"check\"").unwrap();
        let mut manifest: serde_json::Value = serde_json::from_str(&format!("{open}\n}}")).unwrap();
        manifest["format"] = 1.into();
        manifest.as_object_mut().unwrap().remove("shares");
        for piece in manifest["pieces"].as_array_mut().unwrap() {
            piece
                .as_object_mut()
                .unwrap()
                .retain(|key, _| ["name", "bytes", "blake3"].contains(&key.as_str()));
        }
        let json = serde_json::to_string_pretty(&manifest).unwrap();
        let open = json.strip_suffix("\n}").unwrap();
        let check = blake3::hash(open.as_bytes()).to_hex();
        Some(format!("{open},\n  \"check\": \"{check}\"\n}}\n").into_bytes())
    });
    let (loaded, skipped) = load(&location, Which::Newest, &layout()).unwrap();
    assert_is(&loaded, 2);
    assert_eq!((skipped, loaded.head.manifest.format), (Vec::new(), 1));
    assert_eq!(verify(&location, Some(2)).unwrap()[0].flaws, []);
    damage(&store, "model.safetensors", |mut bytes| {
        *bytes.last_mut().unwrap() ^= 1;
        Some(bytes)
    });
    assert_falls_back(&location, "model.safetensors");
}

#[tokio::main(flavor = "current_thread")]
async fn manifest_of_step_1(store: &InMemory) -> Vec<u8> {
    let path = Path::from("step-00000001/manifest.json");
    store.get(&path).await.unwrap().bytes().await.unwrap().to_vec()
}
