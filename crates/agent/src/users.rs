//! Who a process runs as: the guest's `/etc/passwd` and `/etc/group`, read here because a static
//! program has no name service.

use std::fs;

/// A user as a process needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Login name.
    pub name: String,
    /// User number.
    pub uid: u32,
    /// First group.
    pub gid: u32,
    /// All other groups.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: String,
    /// Login shell.
    pub shell: String,
}

/// Finds a user by name or number. Root exists even where no file says so.
pub fn find(wanted: &str) -> Option<User> {
    let passwd = fs::read("/etc/passwd").unwrap_or_default();
    let group = fs::read("/etc/group").unwrap_or_default();
    find_in(wanted, &String::from_utf8_lossy(&passwd), &String::from_utf8_lossy(&group))
}

fn find_in(wanted: &str, passwd: &str, group: &str) -> Option<User> {
    let number: Option<u32> = wanted.parse().ok();
    let listed = passwd.lines().filter_map(parse_user);
    let mut user = listed
        .into_iter()
        .find(|user| user.name == wanted || number == Some(user.uid))
        .or_else(|| (wanted == "root" || number == Some(0)).then(root))?;
    user.groups = group.lines().filter_map(|line| membership(line, &user.name)).collect();
    Some(user)
}

fn parse_user(line: &str) -> Option<User> {
    let mut fields = line.split(':');
    let name = fields.next()?.to_owned();
    let _password = fields.next()?;
    let uid = fields.next()?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    let _comment = fields.next()?;
    let home = fields.next()?.to_owned();
    let shell = fields.next().filter(|shell| !shell.is_empty()).unwrap_or("/bin/sh").to_owned();
    Some(User { name, uid, gid, groups: Vec::new(), home, shell })
}

fn membership(line: &str, name: &str) -> Option<u32> {
    let mut fields = line.split(':').skip(2);
    let gid = fields.next()?.parse().ok()?;
    fields.next()?.split(',').any(|member| member == name).then_some(gid)
}

fn root() -> User {
    User {
        name: "root".into(),
        uid: 0,
        gid: 0,
        groups: Vec::new(),
        home: "/root".into(),
        shell: "/bin/sh".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_found_by_name_and_number() {
        let passwd = "broken\nroot:x:0:0:root:/root:/bin/bash\nann:x:1000:1001::/home/ann:\n";
        let group = "audio:x:29:ann,bob\nx:y\nann:x:1001:\nvideo:x:44:ann\n";
        let ann = find_in("ann", passwd, group).unwrap();
        assert_eq!((ann.uid, ann.gid, ann.groups.as_slice()), (1000, 1001, &[29, 44][..]));
        assert_eq!(ann.shell, "/bin/sh");
        assert_eq!(find_in("1000", passwd, group), Some(ann));
        assert_eq!(find_in("0", passwd, group).unwrap().shell, "/bin/bash");
        assert_eq!(find_in("eve", passwd, group), None);
        assert_eq!(find_in("root", "", "").unwrap(), root());
    }
}
