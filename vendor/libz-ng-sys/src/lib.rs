//! The part of `libz-ng-sys` that flate2 uses, over `libz-rs-sys`.
//!
//! Pingora asks flate2 for its zlib-ng backend, and `libz-ng-sys` builds C with cmake, which a fresh machine lacks.
//! `libz-rs-sys` has the same functions and the same layout in Rust; only the types of two members differ (an
//! `Option` around a function pointer, which has the same representation), so every function here is a pointer cast.
#![expect(non_camel_case_types, non_snake_case, reason = "zlib's own names, as flate2 spells them")]

use std::ffi::{c_char, c_int, c_uint, c_ulong, c_void};

pub use libz_rs_sys::{
    Z_BLOCK, Z_BUF_ERROR, Z_DATA_ERROR, Z_DEFAULT_STRATEGY, Z_DEFLATED, Z_FINISH, Z_FULL_FLUSH, Z_MEM_ERROR,
    Z_NEED_DICT, Z_NO_FLUSH, Z_OK, Z_PARTIAL_FLUSH, Z_STREAM_END, Z_STREAM_ERROR, Z_SYNC_FLUSH,
};

pub type uInt = c_uint;
pub type uLong = c_ulong;
pub type Bytef = u8;
pub type voidpf = *mut c_void;
pub type alloc_func = unsafe extern "C" fn(voidpf, uInt, uInt) -> voidpf;
pub type free_func = unsafe extern "C" fn(voidpf, voidpf);

/// zlib's private state.
pub enum internal_state {}

#[repr(C)]
pub struct z_stream {
    pub next_in: *mut Bytef,
    pub avail_in: uInt,
    pub total_in: uLong,
    pub next_out: *mut Bytef,
    pub avail_out: uInt,
    pub total_out: uLong,
    pub msg: *mut c_char,
    pub state: *mut internal_state,
    pub zalloc: alloc_func,
    pub zfree: free_func,
    pub opaque: voidpf,
    pub data_type: c_int,
    pub adler: uLong,
    pub reserved: uLong,
}
pub type z_streamp = *mut z_stream;

// The casts below rest on these.
const _: () = {
    use libz_rs_sys::z_stream as theirs;
    use std::mem::{align_of, offset_of, size_of};
    assert!(size_of::<z_stream>() == size_of::<theirs>() && align_of::<z_stream>() == align_of::<theirs>());
    assert!(offset_of!(z_stream, next_in) == offset_of!(theirs, next_in));
    assert!(offset_of!(z_stream, avail_in) == offset_of!(theirs, avail_in));
    assert!(offset_of!(z_stream, total_in) == offset_of!(theirs, total_in));
    assert!(offset_of!(z_stream, next_out) == offset_of!(theirs, next_out));
    assert!(offset_of!(z_stream, avail_out) == offset_of!(theirs, avail_out));
    assert!(offset_of!(z_stream, total_out) == offset_of!(theirs, total_out));
    assert!(offset_of!(z_stream, msg) == offset_of!(theirs, msg));
    assert!(offset_of!(z_stream, zalloc) == offset_of!(theirs, zalloc));
    assert!(offset_of!(z_stream, zfree) == offset_of!(theirs, zfree));
    assert!(offset_of!(z_stream, opaque) == offset_of!(theirs, opaque));
    assert!(offset_of!(z_stream, data_type) == offset_of!(theirs, data_type));
    assert!(offset_of!(z_stream, adler) == offset_of!(theirs, adler));
};

macro_rules! forward {
    ($($name:ident($($arg:ident: $type:ty),*) -> $ret:ty;)*) => {$(
        /// # Safety
        /// As zlib's function of this name.
        pub unsafe extern "C" fn $name(strm: z_streamp $(, $arg: $type)*) -> $ret {
            // SAFETY: the layouts are equal (asserted above); the rest is the caller's, as in C.
            unsafe { libz_rs_sys::$name(strm.cast() $(, $arg)*) }
        }
    )*};
}
forward! {
    deflate(flush: c_int) -> c_int;
    deflateEnd() -> c_int;
    deflateReset() -> c_int;
    deflateParams(level: c_int, strategy: c_int) -> c_int;
    deflateSetDictionary(dictionary: *const Bytef, length: uInt) -> c_int;
    deflateInit2_(
        level: c_int, method: c_int, window_bits: c_int, mem_level: c_int, strategy: c_int,
        version: *const c_char, stream_size: c_int
    ) -> c_int;
    inflate(flush: c_int) -> c_int;
    inflateEnd() -> c_int;
    inflateReset() -> c_int;
    inflateReset2(window_bits: c_int) -> c_int;
    inflateSetDictionary(dictionary: *const Bytef, length: uInt) -> c_int;
    inflateInit2_(window_bits: c_int, version: *const c_char, stream_size: c_int) -> c_int;
}

pub extern "C" fn zlibVersion() -> *const c_char {
    libz_rs_sys::zlibVersion()
}
