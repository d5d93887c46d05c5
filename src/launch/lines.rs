//! Lines of a child's output, bounded: a child that prints without end, or without a newline, costs no
//! memory.

use std::io;

use tokio::io::{AsyncBufRead, AsyncBufReadExt};

/// One line without its newline.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BoundedLine {
    /// At most as long as allowed; bytes that aren't UTF-8 are replaced.
    pub(super) text: String,
    /// The rest was thrown away.
    pub(super) cut: bool,
}

/// Reads the next line and keeps its first `bytes_max` bytes; none at the end of the stream.
pub(super) async fn next_line<R: AsyncBufRead + Unpin>(
    reader: &mut R,
    bytes_max: usize,
) -> io::Result<Option<BoundedLine>> {
    let mut kept: Vec<u8> = Vec::new();
    let (mut cut, mut any) = (false, false);
    loop {
        let buffer = reader.fill_buf().await?;
        if buffer.is_empty() {
            return Ok(any.then(|| BoundedLine { text: text_of(&kept), cut }));
        }
        any = true;
        let newline = buffer.iter().position(|byte| *byte == b'\n');
        let line = &buffer[..newline.unwrap_or(buffer.len())];
        let fits = line.len().min(bytes_max - kept.len());
        kept.extend_from_slice(&line[..fits]);
        cut |= fits < line.len();
        let used = line.len() + usize::from(newline.is_some());
        reader.consume(used);
        if newline.is_some() {
            return Ok(Some(BoundedLine { text: text_of(&kept), cut }));
        }
    }
}

fn text_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\r').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_come_one_by_one_and_long_ones_are_cut() {
        // A buffer of two bytes: lines arrive in pieces.
        let mut reader = tokio::io::BufReader::with_capacity(2, &b"one\n\nabcdefgh\nlast"[..]);
        let mut lines = Vec::new();
        while let Some(line) = next_line(&mut reader, 4).await.unwrap() {
            lines.push((line.text, line.cut));
        }
        let expected = [("one", false), ("", false), ("abcd", true), ("last", false)];
        assert_eq!(lines, expected.map(|(text, cut)| (text.to_owned(), cut)));
    }
}
