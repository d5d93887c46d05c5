//! Each fused kernel against its plain form: values, and gradients of everything that went in.

use burn::backend::Autodiff;
use burn::tensor::{Int, Tensor, TensorData};

use crate::backend::Cpu;
use crate::kernels::Kernels;
use crate::plain;

type Graph = Autodiff<Cpu>;
type Flat = Tensor<Graph, 1>;

/// Numbers that look like chance and are the same always, in -1.5 to 1.5.
fn numbers(length: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut draw = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 * 3.0 - 1.5
    };
    (0..length).map(|_| draw()).collect()
}

fn flat(values: Vec<f32>) -> Flat {
    let length = values.len();
    Tensor::from_data(TensorData::new(values, [length]), &Default::default())
}

/// The output, then the gradient of each input, of a form whose output elements all have a say in the gradient.
fn run(lengths: &[usize], form: impl Fn(&[Flat]) -> Flat) -> Vec<Vec<f32>> {
    let leaf = |(seed, &length): (u64, &usize)| flat(numbers(length, seed)).require_grad();
    let leaves: Vec<Flat> = (1..).zip(lengths).map(leaf).collect();
    let y = form(&leaves);
    let say = flat(numbers(y.dims()[0], 99));
    let gradients = (y.clone() * say).sum().backward();
    let values = |data: TensorData| data.to_vec::<f32>().unwrap();
    let gradients = leaves.iter().map(|leaf| values(leaf.grad(&gradients).unwrap().into_data()));
    std::iter::once(values(y.into_data())).chain(gradients).collect()
}

#[track_caller]
fn assert_close(fused: &[Vec<f32>], plain: &[Vec<f32>]) {
    assert_eq!(fused.len(), plain.len());
    for (index, (fused, plain)) in fused.iter().zip(plain).enumerate() {
        assert_eq!(fused.len(), plain.len(), "output, then gradients: number {index}");
        let scale = plain.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        let worst = fused.iter().zip(plain).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(scale > 0.0 && worst <= 1e-5 * scale, "number {index}: off by {worst} of {scale}");
    }
}

#[test]
fn norm_is_that_of_the_plain_form() {
    for (rows, width) in [(1, 8), (7, 24), (150, 130)] {
        let form = |apply: fn(Tensor<Graph, 3>, Flat, Flat, f64) -> Tensor<Graph, 3>| {
            run(&[2 * rows * width, width, width], move |inputs| {
                let x = inputs[0].clone().reshape([2, rows, width]);
                apply(x, inputs[1].clone(), inputs[2].clone(), 1e-5).reshape([-1])
            })
        };
        assert_close(&form(Graph::norm), &form(plain::norm));
    }
}

#[test]
fn linear_is_that_of_the_plain_form() {
    for (rows, inputs, outputs) in [(1, 3, 5), (70, 33, 20), (130, 64, 192)] {
        let form = |apply: fn(Tensor<Graph, 3>, Tensor<Graph, 2>, Flat) -> Tensor<Graph, 3>| {
            run(&[2 * rows * inputs, inputs * outputs, outputs], move |leaves| {
                let x = leaves[0].clone().reshape([2, rows, inputs]);
                apply(x, leaves[1].clone().reshape([inputs, outputs]), leaves[2].clone()).reshape([-1])
            })
        };
        assert_close(&form(Graph::linear), &form(plain::linear));
    }
}

#[test]
fn gelu_is_that_of_the_plain_form() {
    let form = |apply: fn(Tensor<Graph, 3>) -> Tensor<Graph, 3>| {
        run(&[3 * 70 * 301], move |x| apply((x[0].clone() * 6.0).reshape([3, 70, 301])).reshape([-1]))
    };
    assert_close(&form(Graph::gelu), &form(plain::gelu));
}

#[test]
fn attention_is_that_of_the_plain_form() {
    for (batch, time, heads, width) in [(1, 1, 1, 4), (2, 24, 2, 16), (1, 150, 3, 20), (2, 128, 1, 8)] {
        let dim = heads * width;
        let form = |apply: fn(Tensor<Graph, 3>, usize) -> Tensor<Graph, 3>| {
            run(&[batch * time * 3 * dim], move |qkv| {
                apply((qkv[0].clone() * 2.0).reshape([batch, time, 3 * dim]), heads).reshape([-1])
            })
        };
        assert_close(&form(<Graph as Kernels>::attention), &form(plain::attention));
    }
}

#[test]
fn cross_entropy_is_that_of_the_plain_form() {
    for (rows, vocab) in [(1, 3), (150, 257)] {
        let form = |apply: fn(Tensor<Graph, 2>, Tensor<Graph, 1, Int>) -> Flat| {
            let targets: Vec<i32> = (0..rows).map(|row| (row * 31 % vocab) as i32).collect();
            let targets =
                Tensor::<Graph, 1, Int>::from_data(TensorData::new(targets, [rows]), &Default::default());
            run(&[rows * vocab], move |logits| {
                apply((logits[0].clone() * 4.0).reshape([rows, vocab]), targets.clone())
            })
        };
        assert_close(&form(Graph::cross_entropy), &form(plain::cross_entropy));
    }
}

#[test]
fn without_a_graph_the_values_are_the_same() {
    let (x, width) = (numbers(2 * 70 * 48, 5), 48);
    let cpu = |shape: [usize; 3]| {
        Tensor::<Cpu, 3>::from_data(TensorData::new(x.clone(), shape), &Default::default())
    };
    let graph = |shape: [usize; 3]| {
        Tensor::<Graph, 3>::from_data(TensorData::new(x.clone(), shape), &Default::default())
    };
    let shape = [2, 70, width];
    assert_eq!(Cpu::gelu(cpu(shape)).into_data(), Graph::gelu(graph(shape)).into_data());
    let without = <Cpu as Kernels>::attention(cpu(shape), 2).into_data();
    assert_eq!(without, <Graph as Kernels>::attention(graph(shape), 2).into_data());
}

/// Two threads and seven give the bits of one: forward and backward.
#[test]
fn the_number_of_threads_leaves_no_trace() {
    let all = || {
        run(&[2 * 200 * 96, 96, 96, 96 * 288, 288], |leaves| {
            let x = leaves[0].clone().reshape([2, 200, 96]);
            let x = Graph::norm(x, leaves[1].clone(), leaves[2].clone(), 1e-5);
            let qkv = Graph::linear(x, leaves[3].clone().reshape([96, 288]), leaves[4].clone());
            let logits = Graph::gelu(<Graph as Kernels>::attention(qkv, 4)).reshape([400, 96]);
            let targets: Vec<i32> = (0..400).map(|row| row % 96).collect();
            Graph::cross_entropy(
                logits,
                Tensor::from_data(TensorData::new(targets, [400]), &Default::default()),
            )
        })
    };
    let on = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(all);
    let one = on(1);
    assert!(one == on(2) && one == on(7));
}

#[test]
fn what_is_not_finite_stays_so() {
    let x = Tensor::<Cpu, 3>::from_data(
        TensorData::new(vec![f32::NAN, 1.0, 2.0], [1, 1, 3]),
        &Default::default(),
    );
    assert!(Cpu::gelu(x.clone()).into_data().to_vec::<f32>().unwrap()[0].is_nan());
    let qkv = <Cpu as Kernels>::attention(x, 1);
    assert!(qkv.into_data().to_vec::<f32>().unwrap()[0].is_nan());
    let logits =
        Tensor::<Cpu, 2>::from_data(TensorData::new(vec![f32::NAN, 1.0], [1, 2]), &Default::default());
    let targets = Tensor::<Cpu, 1, Int>::from_data(TensorData::new(vec![1i32], [1]), &Default::default());
    assert!(Cpu::cross_entropy(logits, targets).into_data().to_vec::<f32>().unwrap()[0].is_nan());
}
