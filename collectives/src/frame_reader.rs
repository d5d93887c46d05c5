//! Cuts the byte stream of a link into headers and payload, wherever the link has cut it into pieces.

use bytes::{Buf, Bytes};

use crate::frame::{FrameError, HEADER_BYTES, Header};

/// What a stream of frames consists of.
#[derive(Debug)]
pub(crate) enum Part {
    /// A chunk begins.
    Header(Header),
    /// More of the chunk's bytes.
    Payload(Bytes),
}

/// Where in a frame the stream stands.
#[derive(Debug)]
pub(crate) struct FrameReader {
    header: [u8; HEADER_BYTES],
    filled: usize,
    payload_left: usize,
    length_max: u32,
}

impl FrameReader {
    /// Refuses chunks above `length_max` bytes.
    pub(crate) fn new(length_max: u32) -> Self {
        Self { header: [0; HEADER_BYTES], filled: 0, payload_left: 0, length_max }
    }

    /// Takes the next part from the front of `piece`; `None` when the piece is used up.
    pub(crate) fn next(&mut self, piece: &mut Bytes) -> Result<Option<Part>, FrameError> {
        if piece.is_empty() {
            return Ok(None);
        }
        if self.payload_left > 0 {
            let payload = piece.split_to(self.payload_left.min(piece.len()));
            self.payload_left -= payload.len();
            return Ok(Some(Part::Payload(payload)));
        }
        let taken = piece.len().min(HEADER_BYTES - self.filled);
        piece.copy_to_slice(&mut self.header[self.filled..][..taken]);
        self.filled += taken;
        if self.filled < HEADER_BYTES {
            return Ok(None);
        }
        self.filled = 0;
        let header = Header::parse(&self.header, self.length_max)?;
        self.payload_left = header.length as usize;
        Ok(Some(Part::Header(header)))
    }
}
