//! What a file of tensors holds: whole tensors, or flat parts of them.

use std::ops::Range;

use crate::layout::{Layout, TensorMeta};
use crate::slices::{common, normal};

/// Some elements of a tensor, in a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry<'a> {
    pub(crate) tensor: &'a TensorMeta,
    /// Elements of the flat space.
    pub(crate) elements: Range<usize>,
}

impl Entry<'_> {
    /// The name in a file: the tensor's, and which elements where these are not all.
    pub(crate) fn name(&self, suffix: &str) -> String {
        let TensorMeta { name, offset, .. } = self.tensor;
        match self.is_whole() {
            true => format!("{name}{suffix}"),
            false => {
                let (start, end) = (self.elements.start - offset, self.elements.end - offset);
                format!("{name}{suffix}[{start}..{end}]")
            }
        }
    }

    /// The shape in a file.
    pub(crate) fn shape(&self) -> Vec<usize> {
        if self.is_whole() { self.tensor.shape.clone() } else { vec![self.elements.len()] }
    }

    fn is_whole(&self) -> bool {
        self.elements == self.tensor.span()
    }
}

/// What of a layout's tensors lies in these ranges, in the layout's order; those without elements where `empty` says so.
pub(crate) fn entries<'a>(layout: &'a Layout, ranges: &[Range<usize>], empty: bool) -> Vec<Entry<'a>> {
    let mut entries = Vec::new();
    for tensor in layout.tensors() {
        let span = tensor.span();
        if span.is_empty() && empty {
            entries.push(Entry { tensor, elements: span.clone() });
        }
        let from = ranges.partition_point(|range| range.end <= span.start);
        let parts = ranges[from..].iter().map_while(|range| common(range, &span));
        entries.extend(parts.map(|elements| Entry { tensor, elements }));
    }
    entries
}

/// Cuts entries into groups whose elements stay below `most`, where one alone is not more.
pub(crate) fn groups<'e, 'a>(entries: &'e [Entry<'a>], most: usize) -> Vec<&'e [Entry<'a>]> {
    let mut groups = Vec::new();
    let (mut start, mut held) = (0, 0_usize);
    for (at, entry) in entries.iter().enumerate() {
        if at > start && held.saturating_add(entry.elements.len()) > most {
            groups.push(&entries[start..at]);
            (start, held) = (at, 0);
        }
        held = held.saturating_add(entry.elements.len());
    }
    if start < entries.len() {
        groups.push(&entries[start..]);
    }
    groups
}

/// All elements of some entries.
pub(crate) fn holds(entries: &[Entry<'_>]) -> Vec<Range<usize>> {
    normal(entries.iter().map(|entry| entry.elements.clone()).collect())
}

/// The elements that a name in a file stands for, if they are of this tensor: all, or the part in brackets.
pub(crate) fn part(tensor: &TensorMeta, bracket: Option<&str>) -> Option<Range<usize>> {
    let Some(bracket) = bracket else { return Some(tensor.span()) };
    let (start, end) = bracket.split_once("..")?;
    let (start, end): (usize, usize) = (start.parse().ok()?, end.parse().ok()?);
    let inside = start < end && end <= tensor.elements();
    inside.then(|| tensor.offset + start..tensor.offset + end)
}

/// A name without the part in brackets at its end, and that part.
pub(crate) fn split_name(name: &str) -> (&str, Option<&str>) {
    match name.strip_suffix(']').and_then(|name| name.rsplit_once('[')) {
        Some((name, bracket)) => (name, Some(bracket)),
        None => (name, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> Layout {
        let tensor = |name: &str, shape: &[usize], offset| TensorMeta {
            name: name.into(),
            shape: shape.into(),
            offset,
        };
        Layout::new(vec![tensor("b", &[4], 8), tensor("a", &[2, 3], 0), tensor("none", &[0], 0)], 12).unwrap()
    }

    #[test]
    fn whole_tensors_keep_name_and_shape_and_parts_say_which() {
        let layout = layout();
        let named = |ranges: &[Range<usize>], empty| -> Vec<(String, Vec<usize>)> {
            entries(&layout, ranges, empty).iter().map(|entry| (entry.name(".m"), entry.shape())).collect()
        };
        let all = [("b.m".into(), vec![4]), ("a.m".into(), vec![2, 3]), ("none.m".into(), vec![0])];
        assert_eq!(named(&[0..12], true), all);
        assert_eq!(named(&[0..12], false), all[..2]);
        assert_eq!(
            named(&[1..3, 5..9], false),
            [("b.m[0..1]".into(), vec![1]), ("a.m[1..3]".into(), vec![2]), ("a.m[5..6]".into(), vec![1]),]
        );
        assert_eq!(named(&[6..8], false), []);
    }

    #[test]
    fn names_are_read_back() {
        let layout = layout();
        for entry in entries(&layout, &[1..3, 5..9], false) {
            let name = entry.name(".m");
            let (_, bracket) = split_name(&name);
            assert_eq!(part(entry.tensor, bracket), Some(entry.elements));
        }
        let b = &layout.tensors()[0];
        assert_eq!(part(b, None), Some(8..12));
        for odd in ["", "1", "..", "2..1", "1..1", "0..5", "-1..2", "0..18446744073709551616"] {
            assert_eq!(part(b, Some(odd)), None, "{odd}");
        }
    }

    #[test]
    fn groups_stay_small_where_they_can() {
        let layout = layout();
        let entries = entries(&layout, &[0..12], true);
        let sizes = |most| groups(&entries, most).iter().map(|group| group.len()).collect::<Vec<_>>();
        assert_eq!((sizes(usize::MAX), sizes(9), sizes(1)), (vec![3], vec![1, 2], vec![1, 1, 1]));
        assert_eq!(holds(&entries), [0..6, 8..12]);
    }
}
