//! Walks over Burn modules: shapes out, values in and out, gradients out, always in declaration order.

use std::collections::VecDeque;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::ops::FloatTensor;
use burn::tensor::{AllocationProperty, Bytes, DType, Tensor, TensorData, TensorPrimitive};

/// Names and shapes of a module's float parameters.
pub(super) fn shapes<B: Backend, M: Module<B>>(module: &M, prefix: &str) -> Vec<(String, Vec<usize>)> {
    let path = if prefix.is_empty() { Vec::new() } else { vec![Some(prefix.to_owned())] };
    let mut visitor = Shapes { path, found: Vec::new() };
    module.visit(&mut visitor);
    visitor.found
}

/// Values of a module's float parameters, one after the other.
pub(crate) fn values<B: Backend, M: Module<B>>(module: &M) -> Vec<f32> {
    let mut visitor = Values { values: Vec::new() };
    module.visit(&mut visitor);
    visitor.values
}

/// The module with parameters copied from `flat` in order, as leaves of a new graph where the backend keeps one.
///
/// `flat` is `[n]` with at least as many elements as the module has parameters; the parameters become views of the copy.
pub(crate) fn attach<B: Backend, M: Module<B>>(module: M, flat: &[f32], device: &B::Device) -> M {
    attach_data(module, TensorData::new(flat.to_vec(), [flat.len()]), device)
}

/// The same without a copy, where the device computes in this memory: `flat` is dropped once nobody has the parameters any more.
pub(crate) fn attach_shared<B: Backend, M: Module<B>>(
    module: M,
    flat: bytes::Bytes,
    device: &B::Device,
) -> M {
    let elements = flat.len() / size_of::<f32>();
    let flat = Bytes::from_shared(flat, AllocationProperty::Native);
    attach_data(module, TensorData::from_bytes(flat, [elements], DType::F32), device)
}

fn attach_data<B: Backend, M: Module<B>>(module: M, flat: TensorData, device: &B::Device) -> M {
    let flat = Tensor::<B, 1>::from_data(flat, device);
    module.map(&mut Attach { flat, offset: 0 })
}

/// The module without its parameters' values: what they were is given up, shapes and names stay.
pub(crate) fn release<B: Backend, M: Module<B>>(module: M) -> M {
    module.map(&mut Release)
}

/// The parameters of a module with a graph in one without, which shares them.
pub(crate) fn without_graph<B: AutodiffBackend, M: Module<B>, I: Module<B::InnerBackend>>(
    module: &M,
    inner: I,
) -> I {
    let mut inners = Inners::<B> { tensors: VecDeque::new() };
    module.visit(&mut inners);
    inner.map(&mut inners)
}

/// Fills `out` with the gradients of a module's parameters, one after the other; zeros where there is none, and behind them.
pub(crate) fn collect_gradients<B: AutodiffBackend, M: Module<B>>(
    module: &M,
    gradients: &mut B::Gradients,
    out: &mut [f32],
) {
    let mut visitor = Gradients::<B> { gradients, out, offset: 0 };
    module.visit(&mut visitor);
    visitor.out[visitor.offset..].fill(0.0);
}

struct Shapes {
    path: Vec<Option<String>>,
    found: Vec<(String, Vec<usize>)>,
}

impl<B: Backend> ModuleVisitor<B> for Shapes {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let name: Vec<&str> = self.path.iter().flatten().map(String::as_str).collect();
        self.found.push((name.join("."), param.lazy_shape().to_vec()));
    }

    fn enter_module(&mut self, name: &str, container_type: &str) {
        // Which variant an enum has is no part of a parameter's name.
        self.path.push((!container_type.starts_with("Enum:")).then(|| name.to_owned()));
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }
}

struct Values {
    values: Vec<f32>,
}

impl<B: Backend> ModuleVisitor<B> for Values {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        self.values.extend(param.val().into_data().convert::<f32>().iter::<f32>());
    }
}

struct Attach<B: Backend> {
    flat: Tensor<B, 1>,
    offset: usize,
}

impl<B: Backend> ModuleMapper<B> for Attach<B> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let shape = param.lazy_shape();
        let end = self.offset + shape.num_elements();
        let view = self.flat.clone().narrow(0, self.offset, end - self.offset).reshape(shape);
        self.offset = end;
        Param::initialized(param.id, view.detach().require_grad())
    }
}

struct Release;

impl<B: Backend> ModuleMapper<B> for Release {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let (shape, device) = (param.lazy_shape(), param.lazy_device());
        let zeros = {
            let shape = shape.clone();
            move |device: &B::Device, _: bool| Tensor::zeros(shape.clone(), device)
        };
        Param::uninitialized(param.id, zeros, device, true, shape)
    }
}

/// Tensors on their way from one module to another of the same shapes.
struct Inners<B: AutodiffBackend> {
    tensors: VecDeque<FloatTensor<B::InnerBackend>>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Inners<B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        self.tensors.push_back(param.val().inner().into_primitive().tensor());
    }
}

impl<B: AutodiffBackend> ModuleMapper<B::InnerBackend> for Inners<B> {
    fn map_float<const D: usize>(
        &mut self,
        param: Param<Tensor<B::InnerBackend, D>>,
    ) -> Param<Tensor<B::InnerBackend, D>> {
        match self.tensors.pop_front() {
            Some(tensor) => {
                Param::initialized(param.id, Tensor::from_primitive(TensorPrimitive::Float(tensor)))
            }
            None => unreachable!("both are the same block of a task"),
        }
    }
}

struct Gradients<'a, B: AutodiffBackend> {
    gradients: &'a mut B::Gradients,
    out: &'a mut [f32],
    offset: usize,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Gradients<'_, B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let tensor = param.val();
        let end = self.offset + tensor.shape().num_elements();
        let out = &mut self.out[self.offset..end];
        self.offset = end;
        match tensor.grad_remove(self.gradients) {
            None => out.fill(0.0),
            Some(gradient) => copy(gradient.into_data(), out),
        }
    }
}

fn copy(data: TensorData, out: &mut [f32]) {
    match data.as_slice::<f32>() {
        Ok(values) => out.copy_from_slice(values),
        Err(_) => {
            out.iter_mut().zip(data.convert::<f32>().iter::<f32>()).for_each(|(out, value)| *out = value)
        }
    }
}
