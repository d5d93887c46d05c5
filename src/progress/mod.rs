//! What the user sees of a run while it goes on, and at its end; all of it made from the stream of events.
//!
//! On a terminal one line is redrawn in place; elsewhere plain lines appear every few seconds, so that a
//! log stays readable. Everything goes to the writer that it is given (standard error), and every instant
//! comes in as an argument.
//!
//! Deliberately absent: colours, and any number that isn't derived from an event.

mod event;
mod meter;
mod summary;
#[cfg(test)]
mod tests;

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

pub use event::{Event, Rank, Recovered, RunEnded, RunOutcome, Share, Step};
pub use meter::Meter;
pub use summary::Summary;

/// The live line is not redrawn more often.
const REDRAW: Duration = Duration::from_millis(100);
/// Between plain lines.
const PLAIN: Duration = Duration::from_secs(5);
/// Where the terminal does not say how wide it is.
const COLUMNS: usize = 80;
/// Returns to the start of the line and clears it.
const CLEAR: &str = "\r\x1b[2K";

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// One line, redrawn in place.
    Live {
        /// Width of the terminal.
        columns: usize,
    },
    /// A line now and then.
    Plain,
}

impl Mode {
    /// What suits standard error.
    pub fn of_stderr() -> Self {
        if !io::stderr().is_terminal() {
            return Self::Plain;
        }
        let size = terminal_size::terminal_size_of(io::stderr());
        Self::Live { columns: size.map_or(COLUMNS, |(width, _)| usize::from(width.0)) }
    }
}

/// Shows a run as its events come in.
#[derive(Debug)]
pub struct Progress<W> {
    out: W,
    mode: Mode,
    meter: Meter,
    shown: Option<Instant>,
    drawn: bool,
}

impl<W: Write> Progress<W> {
    /// Nothing seen yet.
    pub fn new(out: W, mode: Mode, now: Instant) -> Self {
        Self { out, mode, meter: Meter::new(now), shown: None, drawn: false }
    }

    /// What the events so far add up to.
    pub fn meter(&self) -> &Meter {
        &self.meter
    }

    /// Takes in one event and shows what there is to show.
    ///
    /// # Errors
    /// Where the writer fails.
    pub fn absorb(&mut self, now: Instant, event: &Event) -> io::Result<()> {
        self.meter.absorb(now, event);
        match event {
            Event::Step(step) if self.is_due(now, step) => self.draw(now),
            Event::RunEnded(_) => self.leave_line(),
            event => said(event).map_or(Ok(()), |line| self.line(&line)),
        }
    }

    /// Prints a line of its own, above the live one.
    ///
    /// # Errors
    /// Where the writer fails.
    pub fn line(&mut self, line: &str) -> io::Result<()> {
        let clear = if self.drawn { CLEAR } else { "" };
        writeln!(self.out, "{clear}{line}")?;
        if self.drawn { self.redraw() } else { Ok(()) }
    }

    /// The first and the last step always, others now and then.
    fn is_due(&self, now: Instant, step: &Step) -> bool {
        let interval = if self.mode == Mode::Plain { PLAIN } else { REDRAW };
        let waited = self.shown.is_none_or(|shown| now.duration_since(shown) >= interval);
        waited || step.step >= self.meter.steps
    }

    fn draw(&mut self, now: Instant) -> io::Result<()> {
        self.shown = Some(now);
        match self.mode {
            Mode::Live { .. } => self.redraw(),
            Mode::Plain => writeln!(self.out, "{}", status(&self.meter)),
        }
    }

    fn redraw(&mut self) -> io::Result<()> {
        if let Mode::Live { columns } = self.mode {
            // One column short: a full last column wraps on some terminals.
            let line: String = status(&self.meter).chars().take(columns.saturating_sub(1)).collect();
            write!(self.out, "{CLEAR}{line}")?;
            self.out.flush()?;
            self.drawn = true;
        }
        Ok(())
    }

    /// Leaves the last state of the live line standing.
    fn leave_line(&mut self) -> io::Result<()> {
        if self.drawn {
            self.redraw()?;
            self.drawn = false;
            writeln!(self.out)?;
        }
        Ok(())
    }
}

/// The state of a run on one line.
fn status(meter: &Meter) -> String {
    let Some(step) = &meter.last else { return String::new() };
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let slow: Vec<&str> = meter.slow.iter().map(String::as_str).collect();
    format!(
        "step {}/{}  loss {:.4}  {} tokens/s  ring {} GB/s  {} worker{}{}  {} left",
        step.step,
        meter.steps,
        step.loss,
        or_dash(meter.tokens_per_second().map(|rate| format!("{rate:.0}"))),
        or_dash(meter.ring_bytes_per_second().map(|rate| format!("{:.2}", rate / 1e9))),
        step.world_size,
        if step.world_size == 1 { "" } else { "s" },
        if slow.is_empty() { String::new() } else { format!(" (slow: {})", slow.join(", ")) },
        or_dash(meter.time_left().map(clock)),
    )
}

/// `1:02:03` or `2:03`.
fn clock(time: Duration) -> String {
    let seconds = time.as_secs_f64().round() as u64;
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 { format!("{hours}:{minutes:02}:{seconds:02}") } else { format!("{minutes}:{seconds:02}") }
}

/// The line that an event is worth, if any.
fn said(event: &Event) -> Option<String> {
    Some(match event {
        Event::RunStarted { steps, resumed_from: 0 } => format!("run of {steps} steps"),
        Event::RunStarted { steps, resumed_from } => {
            format!("run of {steps} steps, resumed after {resumed_from}")
        }
        Event::TookOver { incarnation, returned, step } => {
            format!(
                "coordinator {incarnation} has taken over after step {step}: {returned} workers came back"
            )
        }
        Event::Superseded { incarnation, address } => {
            format!("coordinator {incarnation} at {address} has the run now")
        }
        Event::WorkerJoined { worker } => format!("worker {worker} joined"),
        Event::RingFormed { generation, world_size } => {
            format!("ring {generation} formed: world size {world_size}")
        }
        Event::RingRecalled { generation, reason } => format!("ring {generation} is over: {reason}"),
        Event::Waiting { ready, needed } => {
            format!("waiting for workers: {ready} of {needed} are ready; training goes on by itself")
        }
        Event::Recovered(Recovered { step, hold_ms, form_ms, transfer_ms, step_ms, .. }) => format!(
            "step {step} is done, {:.0} ms after the ring was over: {hold_ms:.0} to know what all hold, {form_ms:.0} to link, \
             {transfer_ms:.0} to give the state, {step_ms:.0} to compute",
            hold_ms + form_ms + transfer_ms + step_ms
        ),
        Event::Rebalanced { median_ms, shares } => {
            let less = shares.iter().filter(|share| share.after < share.before);
            let of = |Share { worker, before, after, ms }: &Share| {
                format!(
                    "worker {worker} has {after} micro-batches of a step instead of {before}: one takes it {ms:.1} ms"
                )
            };
            format!("{}; the median is {median_ms:.1} ms", less.map(of).collect::<Vec<_>>().join(", "))
        }
        Event::Checkpoint { step, url } => format!("checkpoint after step {step}: {url}"),
        Event::ScaleRequested { wanted, there } => {
            format!("the run is asked to have {wanted} workers; it has {there}")
        }
        Event::Notice { message } => message.clone(),
        Event::WorkerQuarantined { worker, step, what, agreed, ranks } => format!(
            "worker {worker} differs in its {what} after step {step} from what {agreed} of {ranks} ranks have: nothing of it is used, \
             and it is sent away"
        ),
        Event::WorkerLeft { worker, reason } => format!("worker {worker} has left: {reason}"),
        Event::WorkerLost { worker, reason } => format!("worker {worker} was lost: {reason}"),
        Event::Step(_) | Event::RunEnded(_) | Event::Unknown => return None,
    })
}
