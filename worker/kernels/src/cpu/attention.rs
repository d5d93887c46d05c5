//! Causal multi-head attention (Vaswani et al., 2017) straight from the rows of `qkv`, in tiles of queries.
//!
//! A tile looks at the keys up to its last query only, so half the work of the plain form never happens, and its
//! weights are stored as `[queries, keys up to the last]`: a triangle of tiles for each head and sample. Products
//! read and write rows of `qkv` in place, by strides; nothing is copied, split or transposed.
//!
//! Deliberately absent: recomputation. The weights are kept for the way back.

use multiversion::multiversion;
use rayon::prelude::*;

use super::gemm::{Target, View, product};
use super::math::{exp, largest, sum};

/// Queries of a tile.
const TILE: usize = 64;
/// Elements that are worked on at once beyond a row's end; they end as zeros.
const LANES: usize = 16;

/// Shape of the operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) batch: usize,
    pub(super) time: usize,
    pub(super) heads: usize,
    /// Of a head.
    pub(super) width: usize,
}

/// A tile's queries, and where its weights lie among those of its head.
struct Tile {
    first: usize,
    queries: usize,
    /// Keys that some of its queries see: all up to the last query.
    keys: usize,
    offset: usize,
}

impl Shape {
    fn dim(&self) -> usize {
        self.heads * self.width
    }

    fn scale(&self) -> f32 {
        1.0 / (self.width as f32).sqrt()
    }

    fn tiles(&self) -> impl Iterator<Item = Tile> {
        let time = self.time;
        let mut offset = 0;
        (0..time).step_by(TILE).map(move |first| {
            let queries = TILE.min(time - first);
            let tile = Tile { first, queries, keys: first + queries, offset };
            offset += queries * tile.keys;
            tile
        })
    }

    /// Weights of one head of one sample.
    fn weights(&self) -> usize {
        self.tiles().map(|tile| tile.queries * tile.keys).sum()
    }

    /// Head `head`'s part of `sample`'s rows of `rows`, where a row is `stride` long and the part starts at `column`.
    fn start(&self, sample: usize, head: usize, stride: usize, column: usize) -> usize {
        sample * self.time * stride + column + head * self.width
    }
}

/// q, k and v of one head of one sample.
struct Head<'a> {
    shape: Shape,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
}

impl<'a> Head<'a> {
    fn new(shape: Shape, qkv: &'a [f32], index: usize) -> Self {
        let (sample, head, dim) = (index / shape.heads, index % shape.heads, shape.dim());
        let part = |column| &qkv[shape.start(sample, head, 3 * dim, column)..];
        Self { shape, q: part(0), k: part(dim), v: part(2 * dim) }
    }

    fn stride(&self) -> usize {
        3 * self.shape.dim()
    }

    /// Rows `first..first + rows` of a part.
    fn view(&self, part: &'a [f32], first: usize, rows: usize) -> View<'a> {
        View::new(&part[first * self.stride()..], rows, self.shape.width, self.stride())
    }
}

/// A pointer to an output of which every head writes columns of its own.
#[derive(Clone, Copy)]
struct Shared(*mut f32);
// SAFETY: heads of samples write disjoint elements, see `forward` and `backward`.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Where element `index` lies.
    ///
    /// # Safety
    /// It must lie within the output.
    unsafe fn at(self, index: usize) -> *mut f32 {
        // SAFETY: the caller answers for it.
        unsafe { self.0.add(index) }
    }
}

/// `qkv [batch, time, 3 * dim]` to `(y [batch, time, dim], weights)`.
pub(super) fn forward(shape: Shape, qkv: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (heads, dim) = (shape.batch * shape.heads, shape.dim());
    assert_eq!(qkv.len(), shape.batch * shape.time * 3 * dim, "qkv as its shape says");
    let mut y = vec![0.0; shape.batch * shape.time * dim];
    let mut weights = vec![0.0; heads * shape.weights()];
    let out = Shared(y.as_mut_ptr());
    let each = weights.par_chunks_exact_mut(shape.weights().max(1)).enumerate();
    each.for_each(|(index, weights)| {
        let head = Head::new(shape, qkv, index);
        let start = shape.start(index / shape.heads, index % shape.heads, dim, 0);
        for tile in shape.tiles() {
            let weights = &mut weights[tile.offset..][..tile.queries * tile.keys];
            attend(&head, &tile, weights);
            let weights = View::new(weights, tile.queries, tile.keys, tile.keys);
            // SAFETY: these rows, in this head's columns, are written by nobody else.
            let target = unsafe { Target::new(out.at(start + tile.first * dim), dim, false) };
            product(target, weights, head.view(head.v, 0, tile.keys), 1.0, false);
        }
    });
    (y, weights)
}

/// The weights of one tile.
fn attend(head: &Head<'_>, tile: &Tile, weights: &mut [f32]) {
    let queries = head.view(head.q, tile.first, tile.queries);
    let keys = head.view(head.k, 0, tile.keys);
    // SAFETY: the tile's weights are borrowed for us alone, and as large as the product.
    let target = unsafe { Target::new(weights.as_mut_ptr(), tile.keys, false) };
    product(target, queries, keys.transposed(), head.shape.scale(), false);
    softmax(weights, tile.keys, tile.first);
}

/// Softmax of each row over the keys up to its query, which is `first` in the first row; zeros beyond.
#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl", "x86_64+avx2"))]
fn softmax(rows: &mut [f32], keys: usize, first: usize) {
    for (index, row) in rows.chunks_exact_mut(keys).enumerate() {
        let seen = first + index + 1;
        let most = largest(&row[..seen]);
        let end = seen.next_multiple_of(LANES).min(keys);
        row[seen..end].fill(most);
        row[..end].iter_mut().for_each(|x| *x = exp(*x - most));
        row[seen..].fill(0.0);
        let inverse = 1.0 / sum(end, |i| row[i]);
        row[..end].iter_mut().for_each(|x| *x *= inverse);
    }
}

/// The gradient of `qkv` from `dy [batch, time, dim]`.
pub(super) fn backward(shape: Shape, qkv: &[f32], weights: &[f32], dy: &[f32]) -> Vec<f32> {
    let dim = shape.dim();
    assert_eq!(dy.len(), shape.batch * shape.time * dim, "one gradient for each output");
    let mut dqkv = vec![0.0; qkv.len()];
    let out = Shared(dqkv.as_mut_ptr());
    let each = weights.par_chunks_exact(shape.weights().max(1)).enumerate();
    each.for_each(|(index, weights)| {
        let (sample, number) = (index / shape.heads, index % shape.heads);
        let head = Head::new(shape, qkv, index);
        let dy = &dy[shape.start(sample, number, dim, 0)..];
        let mut dscores = Vec::new();
        for tile in shape.tiles() {
            let weights = &weights[tile.offset..][..tile.queries * tile.keys];
            let dy = View::new(&dy[tile.first * dim..], tile.queries, shape.width, dim);
            // SAFETY: this head's columns of this sample's rows are written by nobody else.
            let part = |row: usize, column, add| unsafe {
                let start = shape.start(sample, number, 3 * dim, column) + row * 3 * dim;
                Target::new(out.at(start), 3 * dim, add)
            };
            let by_key = View::new(weights, tile.queries, tile.keys, tile.keys).transposed();
            product(part(0, 2 * dim, true), by_key, dy, 1.0, false);
            score_gradients(&head, &tile, weights, dy, &mut dscores);
            let dscores = View::new(&dscores, tile.queries, tile.keys, tile.keys);
            let scale = shape.scale();
            product(part(tile.first, 0, false), dscores, head.view(head.k, 0, tile.keys), scale, false);
            let queries = head.view(head.q, tile.first, tile.queries);
            product(part(0, dim, true), dscores.transposed(), queries, scale, false);
        }
    });
    dqkv
}

/// The gradients of a tile's scores, before they were scaled.
fn score_gradients(head: &Head<'_>, tile: &Tile, weights: &[f32], dy: View<'_>, dscores: &mut Vec<f32>) {
    dscores.resize(weights.len(), 0.0);
    // SAFETY: the buffer is ours alone, and as large as the product.
    let target = unsafe { Target::new(dscores.as_mut_ptr(), tile.keys, false) };
    product(target, dy, head.view(head.v, 0, tile.keys).transposed(), 1.0, false);
    softmax_backward(weights, tile.keys, dscores);
}

/// From the gradient of the weights to that of what softmax was taken of, in place.
#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl", "x86_64+avx2"))]
fn softmax_backward(weights: &[f32], keys: usize, gradients: &mut [f32]) {
    for (row, gradient) in weights.chunks_exact(keys).zip(gradients.chunks_exact_mut(keys)) {
        let gradient = &mut gradient[..keys];
        let along = sum(keys, |i| row[i] * gradient[i]);
        gradient.iter_mut().zip(row).for_each(|(g, p)| *g = p * (*g - along));
    }
}
