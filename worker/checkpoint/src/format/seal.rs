//! The check at the end of a JSON object: BLAKE3 over all text before it.
//!
//! So an object that was cut short, edited or hit by a flipped bit is told from a sound one before any of it is believed.

use serde::Serialize;

pub(crate) const CHECK_OPENS: &str = ",\n  \"check\": \"";
const CHECK_CLOSES: &str = "\"\n}\n";

/// A struct as JSON, one member per line, with its check.
pub(crate) fn encode(value: &impl Serialize) -> Vec<u8> {
    let json = serde_json::to_string_pretty(value).expect("string keys and finite numbers");
    seal(json.strip_suffix("\n}").expect("a struct is a JSON object over several lines"))
}

/// Closes a JSON object that lacks its last brace with the check over its text.
pub(crate) fn seal(open_object: &str) -> Vec<u8> {
    let check = blake3::hash(open_object.as_bytes()).to_hex();
    format!("{open_object}{CHECK_OPENS}{check}{CHECK_CLOSES}").into_bytes()
}

/// The text, if it ends with a check that holds.
pub(crate) fn unseal(bytes: &[u8]) -> Option<&[u8]> {
    let rest = bytes.strip_suffix(CHECK_CLOSES.as_bytes())?;
    let (rest, check) = rest.split_at_checked(rest.len().checked_sub(blake3::OUT_LEN * 2)?)?;
    let covered = rest.strip_suffix(CHECK_OPENS.as_bytes())?;
    let holds = blake3::hash(covered).to_hex().as_bytes() == check;
    holds.then_some(bytes)
}
