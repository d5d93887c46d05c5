//! An array that several threads fill at once, each stretches of it that nobody else has.
//!
//! What a reader of many chunks needs: every chunk is checked and copied where it arrives, on any thread, straight to where its
//! elements belong.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

/// An array that is being filled. Nobody sees it before all stretches of it are dropped.
pub(crate) struct Filling(Arc<Vec<f32>>);

/// Elements of an array, which only the holder can reach.
pub(crate) struct Stretch {
    elements: NonNull<[f32]>,
    /// Index of the first of them in the array.
    start: usize,
    /// Owns them, and is not looked into.
    _array: Arc<Vec<f32>>,
}

// SAFETY: whoever has a stretch is the only one who reaches its elements, which are plain numbers.
unsafe impl Send for Stretch {}

impl Filling {
    /// The array, and all of it as one stretch.
    pub(crate) fn new(mut values: Vec<f32>) -> (Filling, Stretch) {
        let elements = NonNull::from(values.as_mut_slice());
        let array = Arc::new(values);
        (Filling(Arc::clone(&array)), Stretch { elements, start: 0, _array: array })
    }

    /// The array, unless somebody still has a stretch of it.
    pub(crate) fn done(self) -> Option<Vec<f32>> {
        Arc::into_inner(self.0)
    }
}

impl Stretch {
    /// Takes these elements of the array out of the front: what lies before them is dropped, what comes after them stays.
    /// None where they are not there (any more).
    pub(crate) fn take(&mut self, range: &Range<usize>) -> Option<Stretch> {
        let end = self.start + self.elements.len();
        if range.start < self.start || range.end > end || range.start > range.end {
            return None;
        }
        // SAFETY: both parts lie within the elements of this stretch, and this stretch keeps the second only.
        let [taken, rest] = [range.clone(), range.end..end].map(|part| unsafe {
            let first = self.elements.cast::<f32>().add(part.start - self.start);
            NonNull::slice_from_raw_parts(first, part.len())
        });
        (self.elements, self.start) = (rest, range.end);
        Some(Stretch { elements: taken, start: range.start, _array: Arc::clone(&self._array) })
    }

    /// The elements, to be written.
    pub(crate) fn values(&mut self) -> &mut [f32] {
        // SAFETY: they are alive with the array, initialised, and nobody else reaches them.
        unsafe { self.elements.as_mut() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_fill_an_array_together() {
        let (filling, mut rest) = Filling::new(vec![-1.0; 100]);
        let stretches: Vec<Stretch> =
            [0..10, 10..10, 12..50, 50..99].iter().map(|range| rest.take(range).unwrap()).collect();
        assert!(rest.take(&(98..100)).is_none() && rest.take(&(99..101)).is_none());
        drop(rest);
        let fill = |mut stretch: Stretch| {
            let start = stretch.start;
            stretch.values().iter_mut().enumerate().for_each(|(at, value)| *value = (start + at) as f32);
        };
        let threads: Vec<_> =
            stretches.into_iter().map(|stretch| std::thread::spawn(move || fill(stretch))).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let want = |at| if at == 10 || at == 11 || at == 99 { -1.0 } else { at as f32 };
        assert_eq!(filling.done().unwrap(), (0..100).map(want).collect::<Vec<f32>>());
    }

    #[test]
    fn nobody_sees_an_array_that_is_being_filled() {
        let (filling, mut all) = Filling::new(vec![0.0; 4]);
        let part = all.take(&(1..2)).unwrap();
        drop(all);
        assert!(filling.done().is_none());
        drop(part);
    }
}
