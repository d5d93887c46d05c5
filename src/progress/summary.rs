//! What a run came to: the block at its end, and the one JSON object of `--json`.

use std::fmt::Write;
use std::path::Path;
use std::time::Instant;

use serde::Serialize;

use super::event::RunEnded;
use super::meter::Meter;

/// What a run came to; serialises to the object that `--json` prints.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Steps done, over all resumptions.
    pub steps: u64,
    /// Loss of the last step.
    pub final_loss: Option<f64>,
    /// Loss of a unigram model of the same tokens.
    pub unigram_loss: Option<f64>,
    /// Loss on tokens that were never trained on.
    pub held_out_loss: Option<f64>,
    /// Parameters of the model.
    pub parameters: Option<u64>,
    /// Hash of the state after the last step.
    pub state_hash: Option<String>,
    /// Over the whole run, start-up left out.
    pub tokens_per_second: Option<f64>,
    /// The part of the time since the first step that went into steps: neither into changes of rings nor into steps done again.
    pub goodput: Option<f64>,
    /// Workers in the last ring.
    pub world_size: u32,
    /// Where complete checkpoints lie, in order.
    pub checkpoints: Vec<String>,
    /// Each phase's share of the ranks' time.
    #[serde(skip)]
    pub shares: Vec<(String, f64)>,
}

impl Summary {
    /// Adds up a run that ended at `now`.
    pub fn new(meter: &Meter, ended: &RunEnded, now: Instant) -> Self {
        let last = meter.last.as_ref();
        Self {
            steps: last.map_or(0, |step| step.step),
            final_loss: last.map(|step| step.loss),
            unigram_loss: ended.unigram_loss,
            held_out_loss: ended.held_out_loss,
            parameters: ended.parameters,
            state_hash: last.map(|step| step.state_hash.clone()),
            tokens_per_second: meter.mean_tokens_per_second(now),
            goodput: meter.goodput(),
            world_size: last.map_or(0, |step| step.world_size),
            checkpoints: meter.checkpoints.clone(),
            shares: meter.shares(),
        }
    }

    /// For people; `folder` is the run's.
    pub fn to_text(&self, folder: &Path) -> String {
        let loss = |loss: Option<f64>| loss.map_or("-".to_owned(), |loss| format!("{loss:.4}"));
        let shares: Vec<String> =
            self.shares.iter().map(|(phase, share)| format!("{phase} {:.1}%", 100.0 * share)).collect();
        let checkpoints = match &self.checkpoints[..] {
            [] => "none".to_owned(),
            [.., newest] => format!("{}, the newest {newest}", self.checkpoints.len()),
        };
        let rows = [
            ("steps", self.steps.to_string()),
            ("final loss", format!("{} (unigram {})", loss(self.final_loss), loss(self.unigram_loss))),
            ("held-out loss", loss(self.held_out_loss)),
            ("parameters", self.parameters.map_or("-".to_owned(), |count| count.to_string())),
            ("tokens/s", self.tokens_per_second.map_or("-".to_owned(), |rate| format!("{rate:.0}"))),
            ("goodput", self.goodput.map_or("-".to_owned(), |part| format!("{:.1}%", 100.0 * part))),
            ("world size", self.world_size.to_string()),
            ("state hash", self.state_hash.clone().unwrap_or_else(|| "-".to_owned())),
            ("step time", if shares.is_empty() { "-".to_owned() } else { shares.join(", ") }),
            ("checkpoints", checkpoints),
            ("folder", folder.display().to_string()),
        ];
        rows.iter().fold(String::new(), |mut text, (name, value)| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{name:>14}  {value}");
            text
        })
    }
}
