//! The places of local workers: which process has which, and whether another takes it when that one has ended.
//!
//! A process that has ended is replaced, unless it did what it was there for, said that the user's input is at fault, or is
//! the last of several in a row in whose time no step was done.

use std::collections::BTreeSet;
use std::process::ExitStatus;

use tokio::process::ChildStdin;

use crate::exit::Exit;

/// Processes in a row that one place may lose without a step.
const FRUITLESS_MAX: u32 = 3;

/// The places, by number.
pub(super) struct Slots {
    respawn: bool,
    slots: Vec<Slot>,
    /// Workers that were started elsewhere, and take part.
    others: BTreeSet<u64>,
}

#[derive(Default)]
struct Slot {
    running: Option<Running>,
    /// How the last one ended.
    status: Option<ExitStatus>,
    fruitless: u32,
    /// Its process is not wanted any more.
    dismissed: bool,
}

struct Running {
    pid: u32,
    /// Its end tells the process to end.
    stdin: Option<ChildStdin>,
    /// Its id in the run, once it has joined.
    worker: Option<u64>,
}

impl Slots {
    /// Empty places.
    pub(super) fn new(count: u32, respawn: bool) -> Self {
        Self { respawn, slots: (0..count).map(|_| Slot::default()).collect(), others: BTreeSet::new() }
    }

    /// A process takes a place.
    pub(super) fn fill(&mut self, number: u32, pid: u32, stdin: ChildStdin) {
        if let Some(slot) = self.slots.get_mut(number as usize) {
            slot.running = Some(Running { pid, stdin: Some(stdin), worker: None });
            slot.dismissed = false;
        }
    }

    /// How many there are.
    pub(super) fn count(&self) -> u32 {
        self.slots.len() as u32
    }

    /// The first empty place, or a new one.
    pub(super) fn open(&mut self) -> u32 {
        let empty = self.slots.iter().position(|slot| slot.running.is_none());
        let number = empty.unwrap_or(self.slots.len());
        match self.slots.get_mut(number) {
            Some(slot) => slot.fruitless = 0,
            None => self.slots.push(Slot::default()),
        }
        number as u32
    }

    /// The places, with their processes, of those that have not joined.
    pub(super) fn starting(&self) -> impl DoubleEndedIterator<Item = (u32, u32)> {
        let waits =
            |slot: &Slot| slot.running.as_ref().filter(|running| running.worker.is_none()).map(|r| r.pid);
        self.slots.iter().enumerate().filter_map(move |(number, slot)| Some((number as u32, waits(slot)?)))
    }

    /// No other takes this place when its process has ended.
    pub(super) fn dismiss(&mut self, number: u32) {
        if let Some(slot) = self.slots.get_mut(number as usize) {
            slot.dismissed = true;
        }
    }

    /// A process has joined the run, of this host or of another.
    pub(super) fn joined(&mut self, pid: u32, is_here: bool, worker: u64) {
        let mut running = self.slots.iter_mut().filter_map(|slot| slot.running.as_mut());
        match running.find(|running| is_here && running.pid == pid) {
            Some(running) => running.worker = Some(worker),
            None => drop(self.others.insert(worker)),
        }
    }

    /// A worker is lost, or has left.
    pub(super) fn gone(&mut self, worker: u64) {
        self.others.remove(&worker);
    }

    /// Whether nobody is left who could go on: no process of these places, and no worker that was started elsewhere.
    pub(super) fn all_gone(&self) -> bool {
        !self.has_any() && self.others.is_empty()
    }

    /// These workers have done a step together.
    pub(super) fn stepped(&mut self, workers: &BTreeSet<u64>) {
        for slot in &mut self.slots {
            let worker = slot.running.as_ref().and_then(|running| running.worker);
            if worker.is_some_and(|worker| workers.contains(&worker)) {
                slot.fruitless = 0;
            }
        }
    }

    /// The process in a place has taken part in a step.
    pub(super) fn proved(&mut self, number: u32) {
        if let Some(slot) = self.slots.get_mut(number as usize) {
            slot.fruitless = 0;
        }
    }

    /// Forgets what places have lost: what they failed at is there no more.
    pub(super) fn forgive(&mut self) {
        self.slots.iter_mut().for_each(|slot| slot.fruitless = 0);
    }

    /// The processes that are there.
    pub(super) fn processes(&self) -> impl Iterator<Item = u32> {
        self.slots.iter().filter_map(|slot| slot.running.as_ref()).map(|running| running.pid)
    }

    /// The process of a worker, if it is still there.
    pub(super) fn process_of(&self, worker: u64) -> Option<u32> {
        let mut running = self.slots.iter().filter_map(|slot| slot.running.as_ref());
        running.find(|running| running.worker == Some(worker)).map(|running| running.pid)
    }

    /// A process has ended; whether another is to take its place.
    pub(super) fn ended(&mut self, number: u32, status: ExitStatus) -> bool {
        let Some(slot) = self.slots.get_mut(number as usize) else { return false };
        slot.running = None;
        slot.status = Some(status);
        slot.fruitless += 1;
        let hopeless = status.success() || status.code() == Some(Exit::BadInput as i32);
        self.respawn && !slot.dismissed && !hopeless && slot.fruitless <= FRUITLESS_MAX
    }

    /// Tells all processes to end.
    pub(super) fn close_stdins(&mut self) {
        self.slots
            .iter_mut()
            .filter_map(|slot| slot.running.as_mut())
            .for_each(|running| running.stdin = None);
    }

    /// Whether any place has a process.
    pub(super) fn has_any(&self) -> bool {
        self.slots.iter().any(|slot| slot.running.is_some())
    }

    /// The numbers of places with a process.
    pub(super) fn living(&self) -> impl Iterator<Item = u32> {
        (0..).zip(&self.slots).filter(|(_, slot)| slot.running.is_some()).map(|(number, _)| number)
    }

    /// How the last process of each place ended; none where there was none.
    pub(super) fn statuses(&self) -> Vec<Option<ExitStatus>> {
        self.slots.iter().map(|slot| slot.status).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Stdio;

    use super::*;

    const DEAD: i32 = 9;

    /// Fills place 0 with a process of this id.
    fn fill(slots: &mut Slots, pid: u32) {
        let mut child = tokio::process::Command::new("true").stdin(Stdio::piped()).spawn().unwrap();
        slots.fill(0, pid, child.stdin.take().unwrap());
    }

    #[tokio::test]
    async fn a_step_makes_a_place_worth_another_try() {
        let mut slots = Slots::new(1, true);
        for pid in 1..=10 {
            fill(&mut slots, pid);
            slots.joined(pid, true, u64::from(pid) + 100);
            assert_eq!(slots.process_of(u64::from(pid) + 100), Some(pid));
            slots.stepped(&BTreeSet::from([u64::from(pid) + 100, 7]));
            assert!(slots.ended(0, ExitStatus::from_raw(DEAD)), "process {pid}");
        }
        let tries = (11..).take_while(|&pid| {
            fill(&mut slots, pid);
            slots.joined(pid, true, 7);
            slots.stepped(&BTreeSet::from([8]));
            slots.ended(0, ExitStatus::from_raw(DEAD))
        });
        assert_eq!(tries.count() as u32, FRUITLESS_MAX - 1, "the last one that took part counts too");
    }

    #[tokio::test]
    async fn places_are_opened_where_none_is_empty_and_the_dismissed_stay_empty() {
        let mut slots = Slots::new(1, true);
        fill(&mut slots, 1);
        slots.joined(1, true, 5);
        assert_eq!(slots.open(), 1);
        slots.dismiss(0);
        assert!(!slots.ended(0, ExitStatus::from_raw(DEAD)));
        assert_eq!((slots.open(), slots.count()), (0, 2));
        fill(&mut slots, 2);
        assert_eq!(slots.starting().collect::<Vec<_>>(), [(0, 2)], "the one before had joined");
        assert!(slots.ended(0, ExitStatus::from_raw(DEAD)), "who takes the place is not dismissed");
    }

    #[tokio::test]
    async fn who_was_started_elsewhere_is_left_when_all_of_here_are_gone() {
        let mut slots = Slots::new(1, true);
        fill(&mut slots, 1);
        // The same number, on another host; and a process of this one that nobody here has started.
        slots.joined(1, false, 6);
        slots.joined(2, true, 7);
        assert_eq!((slots.process_of(6), slots.starting().count()), (None, 1));
        slots.joined(1, true, 5);
        slots.ended(0, ExitStatus::from_raw(DEAD));
        slots.gone(5);
        slots.gone(6);
        assert!(!slots.all_gone(), "worker 7 goes on");
        slots.gone(7);
        assert!(slots.all_gone());
    }

    #[tokio::test]
    async fn an_id_is_that_of_the_process_that_has_it_now() {
        let mut slots = Slots::new(1, true);
        fill(&mut slots, 1);
        slots.joined(1, true, 5);
        slots.ended(0, ExitStatus::from_raw(DEAD));
        fill(&mut slots, 2);
        assert_eq!(slots.process_of(5), None);
        assert_eq!(slots.living().collect::<Vec<u32>>(), [0]);
        assert_eq!(slots.statuses(), [Some(ExitStatus::from_raw(DEAD))]);
    }
}
