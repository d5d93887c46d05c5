//! Block exponents as stored: a magic, a count, then little-endian `i16` in eighths. One page of code, no library:
//! safetensors has no place for the count of blocks that stays the same in ten years.

/// Magic and count.
pub(crate) const HEADER_BYTES: usize = 16;
const MAGIC: &[u8; 8] = b"MTKEXP01";

/// The bytes before the values.
pub(crate) fn header(count: usize) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(MAGIC);
    header[8..].copy_from_slice(&(count as u64).to_le_bytes());
    header
}

/// Reads a whole piece back.
pub(crate) fn decode(bytes: &[u8]) -> Result<Vec<i16>, String> {
    let (header, values) = bytes.split_at_checked(HEADER_BYTES).ok_or("shorter than its header")?;
    let (magic, count) = header.split_at(MAGIC.len());
    if magic != MAGIC {
        return Err("does not start as exponents do".into());
    }
    let count = u64::from_le_bytes(count.try_into().map_err(|_| "shorter than its header")?);
    if count.checked_mul(2) != Some(values.len() as u64) {
        return Err(format!("announces {count} exponents and holds {} bytes of them", values.len()));
    }
    Ok(values.chunks_exact(2).map(|pair| i16::from_le_bytes([pair[0], pair[1]])).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encode(values: &[i16]) -> Vec<u8> {
        let mut bytes = header(values.len()).to_vec();
        values.iter().for_each(|value| bytes.extend(value.to_le_bytes()));
        bytes
    }

    #[test]
    fn bytes_are_pinned() {
        assert_eq!(encode(&[1, -2]), b"MTKEXP01\x02\0\0\0\0\0\0\0\x01\0\xfe\xff");
    }

    proptest! {
        #[test]
        fn values_come_back(values in proptest::collection::vec(any::<i16>(), 0..50)) {
            prop_assert_eq!(decode(&encode(&values)).unwrap(), values);
        }

        #[test]
        fn decoding_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..64), count: u64) {
            let _ = decode(&bytes);
            let mut lying = encode(&[1, 2, 3]);
            lying[8..16].copy_from_slice(&count.to_le_bytes());
            prop_assert_eq!(decode(&lying).is_ok(), count == 3);
        }
    }
}
