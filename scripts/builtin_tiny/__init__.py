"""How ``builtin/tiny`` was made. The package ships the result: each kind of processor would round to another one."""
