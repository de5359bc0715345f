"""The made-up samples: seeded generators that stand in for the two real files without a network.

The reviews are made of the lists below, the temperatures of cycles and noise; a model's scores on
them say nothing about real data.
"""

import numpy as np
import pandas as pd

# A review is a row of clauses. Each category has clauses of its own, related categories share the
# clauses of a group, and ANYWHERE fits all. A line: category, its group, its share in percent.
CATEGORIES = """
书籍 纸 7 情节引人入胜 作者的观点很独到 文字优美 翻译得不通顺 读完很受启发 错别字不少 适合睡前翻一翻 内容有点啰嗦
平板 屏 16 孩子拿来上网课 触控笔很跟手 看视频够大 分屏不太好用 当画板也行 放在支架上看剧 比手机大一圈 平板壳是送的
手机 屏 6 打电话声音清楚 信号时好时坏 拍照夜景不错 双卡很方便 单手握着舒服 来电铃声偏小 指纹解锁灵敏 充一次电用一天
水果 吃 15 个头很均匀 有几个烂了 脆甜多汁 放两天就软了 果皮很薄 酸得倒牙 现摘现发 核很小
洗发水 吃 15 泡沫很丰富 去屑效果一般 洗完头发很柔顺 头皮有点痒 瓶口漏了一点 控油还可以 用完掉头发 留香时间长
热水器 家 3 水温很稳定 师傅上门打孔 点火有点慢 恒温效果好 洗澡不用等 排烟管要另外买 加热时声音大 水压低也能打着
蒙牛 吃 5 奶味很浓 孩子每天一盒 早餐搭配面包 喝起来有点稀 整箱没有破损 老人也爱喝 口感顺滑 盒子有点瘪
衣服 穿 15 尺码偏小 洗了一次就起球 版型很显瘦 袖子太长 领口有线头 颜色很正 穿着不闷 比图片薄
计算机 屏 6 键盘手感好 风扇声音有点响 开机十几秒 显卡跑分正常 硬盘不大够用 预装的软件太多 接口很全 外壳容易留指纹
酒店 家 12 前台态度冷淡 房间打扫得干净 早餐种类少 离地铁站很近 隔音差了点 床很舒服 退房很快 空调不太灵
"""
GROUPS = """
屏 屏幕清晰 运行流畅 系统有点卡 电池不耐用 发热比较明显 外观漂亮 反应很快 做工精细 内存够用
吃 味道不错 生产日期新鲜 包装严实 味道怪怪的 全家都喜欢 闻着很舒服 回购好几次了 分量足
家 服务热情 水不够热 性价比高 设施旧了些 用着放心 声音有点大 卫生间很小 安装收费不合理
穿 质量很好 有一点味道 手感舒服 和描述一样 做工粗糙 给家人选的
纸 印刷清楚 纸张偏薄 包装严实 值得收藏 书角压坏了 给家人选的
"""
ANYWHERE = """
很满意 不太满意 一般般吧 物流很快 客服不回话 价格实惠 下次还来 不会再买了 好评
朋友推荐的 活动时买的 有点失望 总体还行 等了好几天 对得起这个价 和想的不一样 值得推荐 先用用看
"""


def reviews(rows=2000, seed=0):
    """A DataFrame cat,label,review of made-up Chinese reviews; the same for the same seed."""
    rng = np.random.default_rng(seed)
    groups = {}
    for line in GROUPS.split("\n")[1:-1]:
        group, *clauses = line.split()
        groups[group] = clauses
    clauses_of = {}
    shares = []
    for line in CATEGORIES.split("\n")[1:-1]:
        category, group, share, *clauses = line.split()
        clauses_of[category] = [clauses, groups[group], ANYWHERE.split()]
        shares.append(float(share) / 100)
    table = []
    for category in rng.choice(list(clauses_of), size=rows, p=shares):
        length = min(1 + rng.geometric(0.22), 40)
        text = ""
        for kind in rng.choice(3, size=length, p=[0.2, 0.3, 0.5]):
            text += rng.choice(clauses_of[category][kind]) + rng.choice(["，", "。", "！"])
        table.append((category, int(rng.integers(2)), text))
    return pd.DataFrame(table, columns=["cat", "label", "review"])


def temperatures(years=8, seed=0):
    """A DataFrame Date Time,p (mbar),T (degC) of hourly made-up weather from 2009 on.

    Temperature is a yearly and a daily cycle, and noise that persists longer in winter; the
    pressure shows this noise half a day ahead. The same seed gives the same weather.
    """
    rng = np.random.default_rng(seed)
    stamps = pd.date_range("2009-01-01", f"{2009 + years}-01-01", freq="h", inclusive="left")
    hours = len(stamps)
    day = stamps.day_of_year.to_numpy()
    hour = stamps.hour.to_numpy()
    summer = -np.cos(2 * np.pi * (day - 15) / 365.25)  # -1 in mid-January, 1 in mid-July
    year_cycle = 10 + 10 * summer
    day_cycle = (3 + 1.5 * summer) * np.sin(2 * np.pi * (hour - 9) / 24)

    memory = np.exp(-1 / (36 - 18 * summer))  # what is left of the noise after an hour
    noise = np.sqrt(1 - memory**2) * 2.0 * rng.standard_normal(hours)
    for t in range(1, hours):
        noise[t] += memory[t] * noise[t - 1]

    pressure = 1015 - 2 * np.roll(noise, -12) + rng.standard_normal(hours)  # half a day ahead
    frame = pd.DataFrame()
    frame["Date Time"] = stamps.strftime("%d.%m.%Y %H:%M:%S")
    frame["p (mbar)"] = pressure.round(2)
    frame["T (degC)"] = (year_cycle + day_cycle + noise).round(2)
    return frame
