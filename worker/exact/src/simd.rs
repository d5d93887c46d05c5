//! Run-time choice of vector width for plain loops.
//!
//! A loop is written once, as an `#[inline(always)]` function; the macro compiles it for AVX-512, AVX2 and the
//! baseline and picks the widest that the processor has. No loop here fuses multiplication and addition, so all
//! three give the same bits.

/// Defines `pub(crate) fn $name` that runs `$inner` compiled for the widest vectors there are.
macro_rules! widest {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)? = $inner:path) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments, reason = "the slices of one state")]
        $vis fn $name($($arg: $type),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
                fn avx512($($arg: $type),*) $(-> $ret)? { $inner($($arg),*) }
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $type),*) $(-> $ret)? { $inner($($arg),*) }
                if std::arch::is_x86_feature_detected!("avx512f")
                    && std::arch::is_x86_feature_detected!("avx512dq")
                    && std::arch::is_x86_feature_detected!("avx512bw")
                    && std::arch::is_x86_feature_detected!("avx512vl")
                {
                    // SAFETY: the processor has the features that the function was compiled for.
                    return unsafe { avx512($($arg),*) };
                }
                if std::arch::is_x86_feature_detected!("avx2") {
                    // SAFETY: as above.
                    return unsafe { avx2($($arg),*) };
                }
            }
            $inner($($arg),*)
        }
    };
}

pub(crate) use widest;
