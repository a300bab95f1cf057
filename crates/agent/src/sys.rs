//! The system calls for which no safe wrapper is at hand: vsock addresses, interface ioctls, packet
//! sockets, signals by number.

use std::io;
use std::mem::{size_of, zeroed};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// A listening vsock socket on a port of this guest.
pub fn vsock_listen(port: u32) -> io::Result<OwnedFd> {
    const BACKLOG: i32 = 16;
    let socket = socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0)?;
    // SAFETY: all bytes zero is a valid `sockaddr_vm`.
    let mut address: libc::sockaddr_vm = unsafe { zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = libc::VMADDR_CID_ANY;
    address.svm_port = port;
    bind(&socket, &address)?;
    // SAFETY: the descriptor is open; no memory is passed.
    check(unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) })?;
    Ok(socket)
}

/// Mixes bytes into the kernel's random numbers and lets them count at once (random(4)).
pub fn reseed(bytes: &[u8]) -> io::Result<()> {
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    let mut random = std::fs::File::options().write(true).open("/dev/urandom")?;
    io::Write::write_all(&mut random, bytes)?;
    // SAFETY: the descriptor is open; this request takes no argument.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG as _) })?;
    Ok(())
}

/// A socket for IPv4 packets of one interface, without link headers.
pub fn packet_socket(interface: u32) -> io::Result<OwnedFd> {
    let protocol = (libc::ETH_P_IP as u16).to_be();
    let socket = socket(libc::AF_PACKET, libc::SOCK_DGRAM, i32::from(protocol))?;
    bind(&socket, &link_address(interface))?;
    Ok(socket)
}

/// Sends an IPv4 packet to everybody on the link.
pub fn broadcast(socket: &OwnedFd, interface: u32, packet: &[u8]) -> io::Result<()> {
    let mut address = link_address(interface);
    address.sll_halen = 6;
    address.sll_addr = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0];
    // SAFETY: both pointers are valid for the lengths given with them for the time of the call.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            packet.as_ptr().cast(),
            packet.len(),
            0,
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Switches an interface on.
pub fn link_up(name: &str) -> io::Result<()> {
    let mut request = interface_request(name)?;
    interface_ioctl(libc::SIOCGIFFLAGS, &mut request)?;
    // SAFETY: SIOCGIFFLAGS filled this member of the union; every bit pattern is a valid number.
    unsafe { request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short };
    interface_ioctl(libc::SIOCSIFFLAGS, &mut request)
}

/// Switches an interface off.
pub fn link_down(name: &str) -> io::Result<()> {
    let mut request = interface_request(name)?;
    interface_ioctl(libc::SIOCGIFFLAGS, &mut request)?;
    // SAFETY: SIOCGIFFLAGS filled this member of the union; every bit pattern is a valid number.
    unsafe { request.ifr_ifru.ifru_flags &= !(libc::IFF_UP as libc::c_short) };
    interface_ioctl(libc::SIOCSIFFLAGS, &mut request)
}

/// Gives an interface that is off another hardware address.
pub fn set_hardware_address(name: &str, mac: [u8; 6]) -> io::Result<()> {
    let mut request = interface_request(name)?;
    let mut data = [0 as libc::c_char; 14];
    for (to, from) in data.iter_mut().zip(mac) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_hwaddr = libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data: data };
    interface_ioctl(libc::SIOCSIFHWADDR, &mut request)
}

/// Gives an interface its address and netmask.
pub fn set_address(name: &str, address: Ipv4Addr, mask: Ipv4Addr) -> io::Result<()> {
    let mut request = interface_request(name)?;
    request.ifr_ifru.ifru_addr = socket_address(address);
    interface_ioctl(libc::SIOCSIFADDR, &mut request)?;
    request.ifr_ifru.ifru_netmask = socket_address(mask);
    interface_ioctl(libc::SIOCSIFNETMASK, &mut request)
}

/// Takes an interface's address from it, and what leads through it.
pub fn clear_address(name: &str) -> io::Result<()> {
    let mut request = interface_request(name)?;
    request.ifr_ifru.ifru_addr = socket_address(Ipv4Addr::UNSPECIFIED);
    interface_ioctl(libc::SIOCSIFADDR, &mut request)
}

/// Sets the largest packet an interface sends.
pub fn set_mtu(name: &str, mtu: u16) -> io::Result<()> {
    let mut request = interface_request(name)?;
    request.ifr_ifru.ifru_mtu = i32::from(mtu);
    interface_ioctl(libc::SIOCSIFMTU, &mut request)
}

/// Sends everything without a better route to this gateway.
pub fn set_default_route(gateway: Ipv4Addr) -> io::Result<()> {
    let control = socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    // SAFETY: all bytes zero is a valid `rtentry` (numbers and a null device name).
    let mut route: libc::rtentry = unsafe { zeroed() };
    route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = socket_address(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    // SAFETY: SIOCADDRT reads one `rtentry`, which lives through the call.
    check(unsafe { libc::ioctl(control.as_raw_fd(), libc::SIOCADDRT, &raw const route) })
}

/// Sends a signal to a process, or to a process group when `pid` is negative.
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: no memory is passed.
    check(unsafe { libc::kill(pid, signal) })
}

/// Gives every signal its default effect, whatever the agent inherited: an ignored one stays so in
/// programs, and shells cannot trap it then. Makes system calls only.
pub fn default_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: no handler is installed. Signals that cannot be changed are refused.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// The first real-time signal plus `offset`.
pub fn real_time_signal(offset: i32) -> i32 {
    libc::SIGRTMIN() + offset
}

/// Splits the process in two; true in the new one.
///
/// Only for a process that has a single thread.
pub fn fork() -> io::Result<bool> {
    // SAFETY: the caller has one thread, so the child inherits no lock held by another.
    let pid = unsafe { libc::fork() };
    check(pid)?;
    Ok(pid == 0)
}

fn socket(family: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    check(fd)?;
    // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Binds to an address of type `A`, which must be one of the C socket address structures.
fn bind<A: Copy>(socket: &OwnedFd, address: &A) -> io::Result<()> {
    let length = size_of::<A>() as libc::socklen_t;
    // SAFETY: the pointer is valid for `length` bytes during the call, which only reads them.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const *address).cast(), length) })
}

fn link_address(interface: u32) -> libc::sockaddr_ll {
    // SAFETY: all bytes zero is a valid `sockaddr_ll`.
    let mut address: libc::sockaddr_ll = unsafe { zeroed() };
    address.sll_family = libc::AF_PACKET as libc::sa_family_t;
    address.sll_protocol = (libc::ETH_P_IP as u16).to_be();
    address.sll_ifindex = interface as i32;
    address
}

fn interface_request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: all bytes zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    Ok(request)
}

fn interface_ioctl(code: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    let control = socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    // SAFETY: the interface requests used here read or write one `ifreq`, which is borrowed mutably.
    check(unsafe { libc::ioctl(control.as_raw_fd(), code, &raw mut *request) })
}

fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let [a, b, c, d] = address.octets();
    let mut data = [0 as libc::c_char; 14];
    // The port takes the first two bytes.
    for (to, from) in data.iter_mut().skip(2).zip([a, b, c, d]) {
        *to = from.cast_signed();
    }
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: data }
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
