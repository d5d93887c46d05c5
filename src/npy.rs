//! NumPy's array files, as much of the format (version 1.0) as an array of 32-bit integers needs.

use std::io::{self, Write};

/// The header of a row-major array of little-endian `i32` of this shape; its elements follow.
///
/// # Errors
/// Whatever `out` refuses.
pub(crate) fn write_header(out: &mut impl Write, shape: [u64; 3]) -> io::Result<()> {
    let [steps, rows, columns] = shape;
    let dictionary =
        format!("{{'descr': '<i4', 'fortran_order': False, 'shape': ({steps}, {rows}, {columns}), }}");
    // Magic, version and length take 10 bytes; what follows begins at a multiple of 64.
    let length = (10 + dictionary.len() + 1).next_multiple_of(64) - 10;
    out.write_all(b"\x93NUMPY\x01\x00")?;
    // Three numbers of 20 digits at most leave it far below 65,536.
    out.write_all(&(length as u16).to_le_bytes())?;
    writeln!(out, "{dictionary:<width$}", width = length - 1)
}

/// Elements, in the order of the shape.
///
/// # Errors
/// Whatever `out` refuses.
pub(crate) fn write_elements(out: &mut impl Write, elements: &[i32]) -> io::Result<()> {
    elements.iter().try_for_each(|element| out.write_all(&element.to_le_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_padded_to_where_elements_may_begin() {
        let mut bytes = Vec::new();
        write_header(&mut bytes, [2, 1, 3]).unwrap();
        let expected = "{'descr': '<i4', 'fortran_order': False, 'shape': (2, 1, 3), }";
        assert_eq!(bytes.len(), 128);
        assert_eq!(&bytes[..10], b"\x93NUMPY\x01\x00\x76\x00");
        assert_eq!(std::str::from_utf8(&bytes[10..]).unwrap().trim_end(), expected);
        assert_eq!(bytes[127], b'\n');
        write_elements(&mut bytes, &[1, -2]).unwrap();
        assert_eq!(bytes[128..], [1, 0, 0, 0, 254, 255, 255, 255]);
    }
}
