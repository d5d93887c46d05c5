//! Matrix products over strided views, through the crate that Burn's Flex backend uses itself.

/// Products of fewer multiplications than this run on one thread.
const PARALLEL_MIN: usize = 192 * 192 * 192;

/// A matrix somewhere in memory: `rows` by `columns`, with the strides between them in elements.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> View<'a> {
    /// `rows` by `columns`, where a row starts every `stride` elements.
    ///
    /// # Panics
    /// Where it does not lie within `data`.
    pub(super) fn new(data: &'a [f32], rows: usize, columns: usize, stride: usize) -> Self {
        assert!(rows * columns == 0 || (rows - 1) * stride + columns <= data.len(), "a view within its data");
        Self { data, rows, columns, row_stride: stride, column_stride: 1 }
    }

    /// The same elements with rows and columns exchanged.
    pub(super) fn transposed(self) -> Self {
        let Self { data, rows, columns, row_stride, column_stride } = self;
        Self { data, rows: columns, columns: rows, row_stride: column_stride, column_stride: row_stride }
    }
}

/// Where a product goes.
pub(super) struct Target {
    data: *mut f32,
    stride: usize,
    /// Whether it is added to what is there.
    add: bool,
}

impl Target {
    /// A row starts every `stride` elements from `data` on.
    ///
    /// # Safety
    /// All rows of the product that is written here must lie in memory that nobody else uses meanwhile; where `add`
    /// is set it must hold numbers.
    pub(super) unsafe fn new(data: *mut f32, stride: usize, add: bool) -> Self {
        Self { data, stride, add }
    }
}

/// `target = scale * a * b`, or with that added to what is there; on threads where it is large and `threads` says so.
pub(super) fn product(target: Target, a: View<'_>, b: View<'_>, scale: f32, threads: bool) {
    assert_eq!(a.columns, b.rows, "the inner dimensions of a product");
    let (m, n, k) = (a.rows, b.columns, a.columns);
    let large = m.saturating_mul(n).saturating_mul(k) >= PARALLEL_MIN;
    let parallelism = if threads && large { gemm::Parallelism::Rayon(0) } else { gemm::Parallelism::None };
    // SAFETY: `a` and `b` lie within their slices by construction, and who made the target answered for it.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            target.data,
            1,
            target.stride as isize,
            target.add,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// `a * b` as a new matrix, row-major.
pub(super) fn multiplied(a: View<'_>, b: View<'_>) -> Vec<f32> {
    let length = a.rows * b.columns;
    let mut out = Vec::with_capacity(length);
    // SAFETY: the product writes every element of the spare capacity and reads none.
    unsafe {
        product(Target::new(out.as_mut_ptr(), b.columns, false), a, b, 1.0, true);
        out.set_len(length);
    }
    out
}

/// `a * b` added to `out`, row-major.
pub(super) fn add_product(out: &mut [f32], a: View<'_>, b: View<'_>) {
    assert_eq!(out.len(), a.rows * b.columns, "one element for each of the product");
    // SAFETY: `out` is ours alone, and as large as the product.
    let target = unsafe { Target::new(out.as_mut_ptr(), b.columns, true) };
    product(target, a, b, 1.0, true);
}
